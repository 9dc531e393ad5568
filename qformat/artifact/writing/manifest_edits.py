"""Changes of single members of a manifest. All other members stay, even unknown ones (spec section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qformat import strict_json
from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import FileRecord, JsonObject, file_json
from qformat.artifact.manifest_seal import sealed as sealed_bytes
from qformat.artifact.reading.manifest_parser import parse
from qformat.errors import ArtifactError


def with_files(data: bytes, path: Path, files: Mapping[str, FileRecord | None]) -> bytes:
    """Return a manifest with entries of files added, replaced or removed.

    Args:
        data: Bytes of the manifest.
        path: Path of the manifest, for error messages.
        files: New entries by name, None to remove an entry.

    Raises:
        ArtifactError: The manifest is invalid.
    """
    record = _checked_record(data, path)
    assert isinstance(record["files"], dict)
    return sealed_bytes({**record, "files": _entries_with(record["files"], files)})


def _entries_with(old: JsonObject, files: Mapping[str, FileRecord | None]) -> dict[str, object]:
    new = {name: file_json(record) for name, record in files.items() if record is not None}
    return dict(sorted({**{name: entry for name, entry in old.items() if name not in files}, **new}.items()))


def with_accepted(
    data: bytes, path: Path, files: Mapping[str, FileRecord | None], *, sealed: Sequence[JsonObject], evaluated: bool
) -> bytes:
    """Return a manifest in which changes of files are accepted.

    Args:
        data: Bytes of the manifest.
        path: Path of the manifest, for error messages.
        files: New entries of files by name, None to remove an entry.
        sealed: New value of the member `sealed`, which is left out if it is empty.
        evaluated: Whether the evaluation in the manifest is still that of the model.

    Raises:
        ArtifactError: The manifest is invalid.
    """
    written: dict[str, object] = {}
    for key, value in _checked_record(data, path).items():
        if key == "tensors" and sealed:
            written["sealed"] = list(sealed)
        if key == "files":
            assert isinstance(value, dict)
            written[key] = _entries_with(value, files)
        elif key != "sealed" and (key != "evaluation" or evaluated):
            written[key] = value
    return sealed_bytes(written)


def with_evaluation(data: bytes, evaluation: JsonObject, path: Path) -> bytes:
    """Return a manifest with another `evaluation`.

    Args:
        data: Bytes of the manifest.
        evaluation: New value of the member.
        path: Path of the manifest, for error messages.

    Raises:
        ArtifactError: The manifest is invalid.
    """
    written: dict[str, object] = {}
    for key, value in _checked_record(data, path).items():
        if key in {"sealed", "tensors"}:
            written.setdefault("evaluation", evaluation)
        if key != "evaluation":
            written[key] = value
    return sealed_bytes(written)


def _checked_record(data: bytes, path: Path) -> JsonObject:
    """Check a manifest and return all of its members except its digest, including unknown ones."""
    parse(data, path)
    record = strict_json.loads(data, path=path, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    assert isinstance(record, dict)
    del record["manifest_sha256"]
    return record
