"""Which files training data consists of: one, several, a folder of them, or a dataset of the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qformat.artifact.digests import xxh3_of_range
from qformat.errors import DataError, SourceError, UsageError
from qformat.names import REPOSITORY_PATTERN, is_repository_name

Source = Path | str | Sequence[Path | str]


class FileKind(Enum):
    """How rows lie in a file."""

    JSON_LINES = "json_lines"
    PARQUET = "parquet"
    ARROW_STREAM = "arrow_stream"


_KINDS = {
    ".jsonl": FileKind.JSON_LINES,
    ".ndjson": FileKind.JSON_LINES,
    ".json": FileKind.JSON_LINES,
    ".parquet": FileKind.PARQUET,
}

# `.json` inside of a folder is as often its description (dataset_info.json) as it is data.
_IN_FOLDERS = (".jsonl", ".ndjson", ".parquet")

_DATASET = re.compile(rf"(?P<name>{REPOSITORY_PATTERN})(:(?P<configuration>[\w.-]+))?(@(?P<revision>\S+))?")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file with rows."""

    path: Path
    kind: FileKind


@dataclass(frozen=True, slots=True)
class FileState:
    """What a file held when it was hashed. modified_ns tells whether it was written to since."""

    digest: str
    nbytes: int
    modified_ns: int


def find_files(source: Source, *, split: str = "train") -> list[DataFile]:
    """Return the files of a source, in the order in which they are read.

    source: a file; a folder (its .jsonl, .ndjson and .parquet files at any depth, sorted by path); a dataset of the Hub
        as `owner/name`, `owner/name:configuration` or with `@revision` at its end, of which `datasets` keeps a local
        copy; or several of these.
    split: of datasets of the Hub.
    Raises UsageError: nothing is there, or it is of no kind that can be read.
    """
    parts = [source] if isinstance(source, (str, Path)) else list(source)
    if not parts:
        raise UsageError("no data file was given. Name at least one file or folder")
    return [file for part in parts for file in _files_of(part, split)]


def hub_files(
    name: str, *, split: str, configuration: str | None = None, revision: str | None = None
) -> list[DataFile]:
    """Fetch one split of a dataset with `datasets` and return the Arrow files that it keeps in its cache.

    name: `owner/dataset`, or a local folder in the same layout. Raises UsageError where `datasets` cannot get it.
    """
    import datasets

    if "[" in split:  # the files hold the whole split
        raise UsageError(f"{name}: split={split!r} is a part of a split. Name a whole one, or write the part to a file")
    try:
        rows = datasets.load_dataset(name, configuration, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        first = " ".join(str(problem).split())
        raise UsageError(
            f"{name}: no such path here, and `datasets` cannot load its split {split!r}: {first}. "
            "Check the name (owner/name:configuration@revision), the split and the connection"
        ) from problem
    return [DataFile(Path(entry["filename"]), FileKind.ARROW_STREAM) for entry in rows.cache_files]


def read_state(file: DataFile) -> FileState:
    """Hash a file (several GB/s where it is cached). Raises UsageError, or DataError where it shrinks meanwhile."""
    descriptor = _open(file.path)
    try:
        before = os.fstat(descriptor)
        digest = xxh3_of_range(descriptor, 0, before.st_size, path=file.path, error=SourceError)
        return FileState(digest, before.st_size, before.st_mtime_ns)
    except SourceError:
        raise _changed(file) from None
    finally:
        os.close(descriptor)


def check_unchanged(file: DataFile, state: FileState) -> None:
    """Raise DataError for a file that is gone or has another size or time than when it was hashed."""
    try:
        now = file.path.stat()
    except OSError:
        raise _changed(file) from None
    if (now.st_size, now.st_mtime_ns) != (state.nbytes, state.modified_ns):
        raise _changed(file)


def _changed(file: DataFile) -> DataError:
    return DataError(
        "file_changed",
        file.path,
        "was written to while it was read",
        place=None,
        next_step="Start again when it is complete",
    )


def _files_of(source: Path | str, split: str) -> list[DataFile]:
    if isinstance(source, str) and not os.path.lexists(source) and Path(source).suffix not in _KINDS:
        match = _DATASET.fullmatch(source)
        if match is not None and is_repository_name(match["name"]):
            return hub_files(split=split, **match.groupdict())
    return _local_files(Path(source))


def _local_files(path: Path) -> list[DataFile]:
    if path.is_dir():
        inside = [entry for entry in path.rglob("*") if entry.suffix in _IN_FOLDERS and entry.is_file()]
        visible = [entry for entry in inside if not any(part.startswith(".") for part in entry.relative_to(path).parts)]
        if not visible:
            raise UsageError(f"{path}: the folder holds no {', '.join(_IN_FOLDERS)} file. Name the files one by one")
        return [DataFile(entry, _KINDS[entry.suffix]) for entry in sorted(visible)]
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder. Check the path; a Hub dataset is owner/name")
    if not path.is_file():
        raise UsageError(f"{path}: is no regular file. Copy the data to a file first")
    if path.suffix not in _KINDS:
        raise UsageError(f"{path}: the name must end in one of {', '.join(_KINDS)}. Convert or rename the file")
    return [DataFile(path, _KINDS[path.suffix])]


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as problem:
        raise UsageError(f"{path}: cannot be opened: {problem.strerror}. Check the path and its permissions") from None
