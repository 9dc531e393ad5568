"""Finds the files of training data: single files, folders or Hub datasets. Detects changes while they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qformat.artifact.digests import xxh3_of_range
from qformat.artifact.sources.stand_ins import stand_in_of
from qformat.errors import DataError, SourceError, UsageError
from qformat.named_files import open_named
from qformat.names import REPOSITORY_PATTERN, is_repository_name

Source = Path | str | Sequence[Path | str]


class FileKind(Enum):
    """Format of a data file."""

    JSON = "json"  # JSON Lines or one array
    JSON_LINES = "json_lines"
    PARQUET = "parquet"
    ARROW_STREAM = "arrow_stream"


_KINDS = {
    ".jsonl": FileKind.JSON_LINES,
    ".ndjson": FileKind.JSON_LINES,
    ".json": FileKind.JSON,
    ".parquet": FileKind.PARQUET,
}

# Without `.json`: inside a folder, such a file is often metadata (dataset_info.json) rather than data.
_IN_FOLDERS = (".jsonl", ".ndjson", ".parquet")

_DATASET = re.compile(rf"(?P<name>{REPOSITORY_PATTERN})(:(?P<configuration>[\w.-]+))?(@(?P<revision>\S+))?")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of training data."""

    path: Path
    kind: FileKind


@dataclass(frozen=True, slots=True)
class FileState:
    """State of a file when it was hashed.

    Attributes:
        digest: XXH3-128 digest of the content.
        nbytes: Size in bytes.
        modified_ns: Modification time in nanoseconds, which shows whether the file was written to since.
    """

    digest: str
    nbytes: int
    modified_ns: int


def find_files(source: Source, *, split: str = "train") -> list[DataFile]:
    """Return the files of a source, in reading order.

    Args:
        source: A file, a folder, a Hub dataset, or a sequence of these. A folder stands for its .jsonl, .ndjson and
            .parquet files at any depth, sorted by path. A Hub dataset is `owner/name` or `owner/name:configuration`,
            optionally followed by `@revision`; `datasets` downloads it and keeps a local copy.
        split: Split to read from Hub datasets.

    Returns:
        The files with their formats.

    Raises:
        UsageError: The source does not exist, or its format is not supported.
        DataError: A local file was not fetched: it is a pointer of Git LFS, for example.
    """
    parts = [source] if isinstance(source, (str, Path)) else list(source)
    if not parts:
        raise UsageError("no training data was given. Give at least one file, folder or Hub dataset")
    return [file for part in parts for file in _files_of(part, split)]


def refuse_stand_in(path: Path, *, is_text: bool = False) -> None:
    """Reject a data file that was not fetched.

    Args:
        path: Path of the file.
        is_text: Whether the file may be any text, a web page included.

    Raises:
        DataError: A pointer or an error page is in the place of the file.
    """
    if (found := stand_in_of(path, is_text=is_text)) is not None:
        raise DataError("not_fetched", path, found.problem, place=None, next_step=found.next_step)


def hub_files(
    name: str, *, split: str, configuration: str | None = None, revision: str | None = None
) -> list[DataFile]:
    """Download one split of a dataset with `datasets` and return the Arrow files in its cache.

    Args:
        name: `owner/dataset`, or a local folder in the same layout.
        split: Name of the split.
        configuration: Configuration of the dataset, or None for the default.
        revision: Revision on the Hub, or None for the default.

    Returns:
        The Arrow files of the split.

    Raises:
        UsageError: `datasets` cannot load the split, or `split` selects only a part of it.
    """
    import datasets

    if "[" in split:  # the cached files always hold the complete split
        raise UsageError(
            f"{name}: split={split!r} selects a part of a split, which is not supported. Use a complete split, or "
            "write the part to a file"
        )
    try:
        rows = datasets.load_dataset(name, configuration, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        first = " ".join(str(problem).split()).rstrip(".")
        raise UsageError(
            f"{name}: does not exist as a local path, and `datasets` cannot load its split {split!r}: {first}. "
            "Check the name (owner/name:configuration@revision), the split and the network connection"
        ) from problem
    return [DataFile(Path(entry["filename"]), FileKind.ARROW_STREAM) for entry in rows.cache_files]


def read_state(file: DataFile) -> FileState:
    """Hash a file and return its state. A cached file is hashed at several GB/s.

    Raises:
        UsageError: The file cannot be opened.
        DataError: The file shrank while it was read.
    """
    try:
        opened = open_named(file.path)
    except OSError as problem:
        raise UsageError(
            f"{file.path}: cannot be opened: {problem.strerror}. Check the path and its permissions"
        ) from None
    with opened:
        before = os.fstat(opened.fileno())
        try:
            digest = xxh3_of_range(opened.fileno(), 0, before.st_size, path=file.path, error=SourceError)
        except SourceError:
            raise _changed(file) from None
        return FileState(digest, before.st_size, before.st_mtime_ns)


def check_unchanged(file: DataFile, state: FileState) -> None:
    """Check that a file has not changed since it was hashed.

    Args:
        file: File to check.
        state: State of the file when it was hashed.

    Raises:
        DataError: The file is gone, or its size or modification time changed.
    """
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
        "changed while it was read",
        place=None,
        next_step="Run the command again when the file is complete",
    )


def _files_of(source: Path | str, split: str) -> list[DataFile]:
    if isinstance(source, str) and not os.path.lexists(source) and Path(source).suffix not in _KINDS:
        match = _DATASET.fullmatch(source)
        if match is not None and is_repository_name(match["name"]):
            return hub_files(split=split, **match.groupdict())
    files = _local_files(Path(source))
    for file in files:
        refuse_stand_in(file.path)
    return files


def _local_files(path: Path) -> list[DataFile]:
    if path.is_dir():
        inside = [entry for entry in path.rglob("*") if entry.suffix in _IN_FOLDERS and entry.is_file()]
        visible = [entry for entry in inside if not any(part.startswith(".") for part in entry.relative_to(path).parts)]
        if not visible:
            raise UsageError(f"{path}: the folder has no {', '.join(_IN_FOLDERS)} file. Give the files one by one")
        return [DataFile(entry, _KINDS[entry.suffix]) for entry in sorted(visible)]
    if not path.exists():
        raise UsageError(f"{path}: does not exist. Check the path; a Hub dataset is given as owner/name")
    if not path.is_file():
        raise UsageError(
            f"{path}: is not a regular file, and data are read more than once. Write the data to a file first"
        )
    if path.suffix not in _KINDS:
        raise UsageError(f"{path}: the name must end in one of {', '.join(_KINDS)}. Convert or rename the file")
    return [DataFile(path, _KINDS[path.suffix])]
