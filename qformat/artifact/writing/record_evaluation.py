"""Recording of evaluation results in the manifest of an artifact, which may be in use: an atomic replacement."""

from __future__ import annotations

from pathlib import Path

from qformat.artifact.manifest import JsonObject, Manifest
from qformat.artifact.reading.manifest_parser import parse
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.locked_manifest import locked_manifest
from qformat.artifact.writing.manifest_edits import with_evaluation
from qformat.errors import TargetError
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
    with locked_manifest(path) as data:
        target = path / MANIFEST_NAME
        if parse(data, target).tensors != of.tensors:
            raise TargetError(f"{path}: the weights are not the ones that were evaluated. Evaluate the artifact again")
        (disk or Disk()).replace_file(target, with_evaluation(data, evaluation, target))
