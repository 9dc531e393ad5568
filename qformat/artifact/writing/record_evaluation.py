"""Put an evaluation into the manifest of an artifact that is in use: another file under the same name, in one step."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import JsonObject, Manifest, parse, with_evaluation
from qformat.artifact.reading.regular_files import read_small
from qformat.artifact.writing.disk import Disk
from qformat.errors import ArtifactError, TargetError
from qformat.names import MANIFEST_NAME

_UNFINISHED_NAME = f".{MANIFEST_NAME}.partial"
"""A verifier passes over names that begin with a dot, so that a killed recording leaves a good artifact."""


def record_evaluation(path: Path, evaluation: JsonObject, *, of: Manifest, disk: Disk | None = None) -> None:
    """Write `evaluation` into the manifest in folder `path`, and renew the manifest's digest of itself.

    of: the manifest of what was measured; nothing is written where other weights stand there by now.
    Raises TargetError, also for a manifest in the Hub's cache, whose files belong to their digests; ArtifactError for
        a damaged manifest.
    """
    disk = disk or Disk()
    target = path / MANIFEST_NAME
    if target.is_symlink():
        raise TargetError(f"{target}: is a link into the Hub's cache. Copy the artifact to a folder of your own first")
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TargetError(f"{path}: another process is recording an evaluation there. Try again") from None
        data = read_small(path, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
        if parse(data, target).tensors != of.tensors:
            raise TargetError(f"{path}: holds other weights than those that were measured. Evaluate it again")
        unfinished = path / _UNFINISHED_NAME
        disk.write_file(unfinished, with_evaluation(data, evaluation, target))
        disk.rename(unfinished, target)
        disk.sync_folder(path)
    finally:
        os.close(folder)
