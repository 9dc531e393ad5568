"""Recording of evaluation results in the manifest of an artifact, which may be in use: an atomic replacement."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import JsonObject, Manifest
from qformat.artifact.reading.manifest_parser import parse
from qformat.artifact.reading.regular_files import read_small
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.manifest_edits import with_evaluation
from qformat.errors import ArtifactError, TargetError
from qformat.names import MANIFEST_NAME


def record_evaluation(path: Path, evaluation: JsonObject, *, of: Manifest, disk: Disk | None = None) -> None:
    """Write evaluation results to the manifest of an artifact.

    Args:
        path: Directory of the artifact.
        evaluation: New value of the member `evaluation`.
        of: Manifest of the weights that were evaluated.
        disk: File system operations.

    Raises:
        TargetError: The manifest cannot be written, is a link into the Hub's cache, or now has other weights.
        ArtifactError: The manifest is damaged.
    """
    disk = disk or Disk()
    target = path / MANIFEST_NAME
    if target.is_symlink():
        raise TargetError(f"{target}: is a link into the Hub's cache. Copy the artifact to another directory first")
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TargetError(f"{path}: another process is recording an evaluation. Try again") from None
        data = read_small(path, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
        if parse(data, target).tensors != of.tensors:
            raise TargetError(f"{path}: the weights are not the ones that were evaluated. Evaluate the artifact again")
        disk.replace_file(target, with_evaluation(data, evaluation, target))
    finally:
        os.close(folder)
