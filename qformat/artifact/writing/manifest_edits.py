"""A manifest with one member changed; all else that it says stays, known to this version or not (spec section 7)."""

from __future__ import annotations

from pathlib import Path

from qformat import strict_json
from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import FileRecord, JsonObject, file_json
from qformat.artifact.manifest_seal import sealed
from qformat.artifact.reading.manifest_parser import parse
from qformat.errors import ArtifactError


def with_file(data: bytes, path: Path, name: str, file: FileRecord) -> bytes:
    """Return a manifest that lists one file more (or another file of that name); nothing else in it changes.

    data, path: an artifact's manifest, which is checked, and where it lies. Members that this version does not know
    stay as they are. Raises ArtifactError.
    """
    record = _checked_record(data, path)
    assert isinstance(record["files"], dict)
    return sealed({**record, "files": dict(sorted({**record["files"], name: file_json(file)}.items()))})


def with_evaluation(data: bytes, evaluation: JsonObject, path: Path) -> bytes:
    """Return the bytes of a manifest with another `evaluation` and all else that it says, known or not.

    Raises: ArtifactError, as `parse`.
    """
    written: dict[str, object] = {}
    for key, value in _checked_record(data, path).items():
        if key == "tensors":
            written["evaluation"] = evaluation
        if key != "evaluation":
            written[key] = value
    return sealed(written)


def _checked_record(data: bytes, path: Path) -> JsonObject:
    """Return all members of a good manifest but its digest, those that this version does not know included."""
    parse(data, path)
    record = strict_json.loads(data, path=path, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    assert isinstance(record, dict)
    del record["manifest_sha256"]
    return record
