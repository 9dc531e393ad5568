"""Caches tokenised examples on disk, so that a second run starts immediately.

`FOLDER/KEY/` holds three flat little-endian files and a header:

    tokens         int32   token ids of all examples, concatenated
    trained        uint8   1 for each token that is trained, else 0
    starts         int64   start of each example in the two files above, and the end of the last example
    header.json            statistics, sizes and XXH3-128 digests of the three files, and a digest of the header itself

KEY is a digest of everything that the tokens depend on, so a cache is never out of date. A cache is written as
`KEY.partial/` and renamed when it is complete. The writer holds `KEY.lock`, so that a second process waits and then
uses the finished cache.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat import strict_json
from qformat.artifact.digests import Xxh3, xxh3, xxh3_of_range
from qformat.artifact.writing.disk import Disk
from qformat.errors import InvalidFileError, SourceError, TargetError
from qformat.names import PARTIAL_SUFFIX
from qformat.strict_json import Json
from qformat.training.data.statistics import DataStatistics
from qformat.training.data.tokenise import Tokens

CACHE_VERSION = 2

_HEADER = "header.json"
_MAX_HEADER_NBYTES = 2**16
_DTYPES: dict[str, np.dtype[Any]] = {"tokens": np.dtype("<i4"), "trained": np.dtype("u1"), "starts": np.dtype("<i8")}


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """An open cache, with its files mapped read-only.

    Attributes:
        folder: Directory of the cache.
        content_digest: Digest of the data files.
        statistics: Counts of the tokenised data.
        tokens: Token ids of all examples, int32 (n_tokens,).
        trained: 1 for each token that is trained, else 0, uint8 (n_tokens,).
        starts: Start of each example and the end of the last one, int64 (n_examples + 1,).
    """

    folder: Path
    content_digest: str
    statistics: DataStatistics
    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    starts: NDArray[np.int64]


_ANOTHER_FOLDER = "Tokenised data is cached there: set XDG_CACHE_HOME to a directory that can be written"


class _Damaged(Exception):
    """The content of a cache does not match its header. The cache is rebuilt."""


def default_folder() -> Path:
    """Return the default directory of the cache: `$XDG_CACHE_HOME/qformat/tokenised`, or the same in `~/.cache`.

    Raises:
        TargetError: The home directory is unknown.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "qformat" / "tokenised"
    except RuntimeError as problem:
        raise TargetError(f"{str(problem).rstrip('.')}. {_ANOTHER_FOLDER}") from None


def open_cache(folder: Path, key: str, *, every_byte: bool = False) -> CachedTokens | None:
    """Map a cache into memory, or return None if it is absent or damaged.

    Checks the digest of the header, the sizes of all files, and the digest of `starts`, which gives the boundaries of
    the examples.

    Args:
        folder: Directory of all caches.
        key: Key of this cache.
        every_byte: Whether to check the digests of the other files as well.

    Returns:
        The open cache, or None.
    """
    try:
        return _open(folder / key, key, every_byte=every_byte)
    except (_Damaged, InvalidFileError, OSError):
        return None


@contextmanager
def locked(folder: Path, key: str, disk: Disk) -> Iterator[None]:
    """Hold the lock of a cache. Waits while another process builds the cache.

    Args:
        folder: Directory of all caches. Created if it does not exist.
        key: Key of this cache.
        disk: Performs the file operations.

    Raises:
        TargetError: The directory cannot be written.
    """
    try:
        disk.make_folders(folder)
        descriptor = disk.open_for_writing(folder / f"{key}.lock")
    except TargetError as problem:
        raise TargetError(f"{folder}: {problem}. {_ANOTHER_FOLDER}") from problem
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class CacheWriter:
    """Writes a cache example by example. The cache gets its final name in `finish`.

    The caller must hold the lock.

    Args:
        folder: Directory of all caches.
        key: Key of this cache.
        disk: Performs the file operations.
    """

    def __init__(self, folder: Path, key: str, disk: Disk) -> None:
        self._target = folder / key
        self._partial = folder / f"{key}{PARTIAL_SUFFIX}"
        self._key = key
        self._disk = disk
        disk.remove_folder(self._partial)  # left by a process that was killed
        disk.make_folder(self._partial)
        self._pieces = {name: _Piece(self._partial / name, disk) for name in _DTYPES}
        self._n_tokens = 0
        self._pieces["starts"].append(np.zeros(1, np.int64))

    def append(self, examples: Iterable[Tokens]) -> None:
        """Append examples."""
        batch = list(examples)
        if not batch:
            return
        ends = self._n_tokens + np.cumsum([len(example.ids) for example in batch])
        self._pieces["tokens"].append(np.concatenate([example.ids for example in batch]))
        self._pieces["trained"].append(np.concatenate([example.trained for example in batch]))
        self._pieces["starts"].append(ends)
        self._n_tokens = int(ends[-1])

    def finish(self, statistics: DataStatistics, content_digest: str) -> None:
        """Write the header, sync all files to disk and rename the cache to its final name.

        Args:
            statistics: Counts of the tokenised data.
            content_digest: Digest of the data files.
        """
        files: dict[str, Json] = {name: piece.finish() for name, piece in self._pieces.items()}
        header: dict[str, Json] = {
            "version": CACHE_VERSION,
            "key": self._key,
            "content_digest": content_digest,
            "statistics": statistics.to_json(),
            "files": files,
        }
        record: dict[str, Json] = {"header": header, "digest": _digest(header)}
        self._disk.write_file(self._partial / _HEADER, strict_json.dumps(record, indent=1).encode("utf-8"))
        self._disk.sync_folder(self._partial)
        # This may replace a damaged cache. A process that has mapped the old files keeps its mapping.
        self._disk.replace_folder(self._partial, self._target)

    def close(self) -> None:
        """Close the files and remove an unfinished cache."""
        for piece in self._pieces.values():
            piece.close()
        self._disk.remove_folder(self._partial)


class _Piece:
    """One file of a cache, hashed while it is written."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path = path
        self._dtype = _DTYPES[path.name]
        self._disk = disk
        self._digest = Xxh3()
        self._nbytes = 0
        self._descriptor: int | None = disk.open_for_writing(path, append=True)

    def append(self, values: NDArray[np.generic]) -> None:
        assert self._descriptor is not None
        data = values.astype(self._dtype).tobytes()
        self._disk.append(self._descriptor, data, self._path)
        self._digest.update(data)
        self._nbytes += len(data)

    def finish(self) -> dict[str, Json]:
        assert self._descriptor is not None
        self._disk.sync(self._descriptor, self._path)
        self.close()
        return {"nbytes": self._nbytes, "xxh3": self._digest.hexdigest()}

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open(folder: Path, key: str, *, every_byte: bool) -> CachedTokens:
    header = _read_header(folder / _HEADER)
    statistics, content_digest, files = _header_fields(header, key)
    maps = {}
    for name, dtype in _DTYPES.items():
        nbytes, digest = files[name]
        path = folder / name
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != nbytes:
                raise _Damaged
            checked = every_byte or name == "starts"
            if checked and xxh3_of_range(file.fileno(), 0, nbytes, path=path, error=SourceError) != digest:
                raise _Damaged
            maps[name] = np.memmap(file, dtype, "r") if nbytes else np.empty(0, dtype)
    starts = maps["starts"]
    n_tokens = statistics.tokens
    expected = {"tokens": n_tokens, "trained": n_tokens, "starts": statistics.examples + 1}
    if any(len(maps[name]) != length for name, length in expected.items()) or starts[0] != 0 or starts[-1] != n_tokens:
        raise _Damaged
    return CachedTokens(folder, content_digest, statistics, maps["tokens"], maps["trained"], starts)


def _read_header(path: Path) -> dict[str, Json]:
    with path.open("rb") as file:
        data = file.read(_MAX_HEADER_NBYTES + 1)
    record = strict_json.loads(data, path=path, max_nbytes=_MAX_HEADER_NBYTES, error=SourceError)
    if not isinstance(record, dict) or set(record) != {"header", "digest"}:
        raise _Damaged
    header = record["header"]
    if not isinstance(header, dict) or record["digest"] != _digest(header):
        raise _Damaged
    return header


def _header_fields(header: dict[str, Json], key: str) -> tuple[DataStatistics, str, dict[str, tuple[int, str]]]:
    """Return the fields of a header with a valid digest, which may come from another version of this module."""
    if header.get("version") != CACHE_VERSION or header.get("key") != key:
        raise _Damaged
    content_digest, files = header.get("content_digest"), header.get("files")
    if not isinstance(content_digest, str) or not isinstance(files, dict) or set(files) != set(_DTYPES):
        raise _Damaged
    found = {}
    for name, file in files.items():
        nbytes, digest = (file.get("nbytes"), file.get("xxh3")) if isinstance(file, dict) else (None, None)
        if not isinstance(nbytes, int) or not isinstance(digest, str):
            raise _Damaged
        found[name] = (nbytes, digest)
    try:
        return DataStatistics.from_json(header.get("statistics")), content_digest, found
    except ValueError:
        raise _Damaged from None


def _digest(header: dict[str, Json]) -> str:
    return xxh3(strict_json.dumps(header).encode("utf-8"))
