"""Tokenised examples on the disk, so that a second run starts at once: three flat files and a header.

`FOLDER/KEY/` holds, little-endian,

    tokens         int32   the ids of all examples, one after the other
    trained        uint8   1 where that token is trained on
    starts         int64   where each example starts in the two, and where the last one ends
    header.json            statistics, sizes and XXH3-128 digests of the three, and a digest of the header itself

KEY names everything that the tokens depend on, so that a cache is never out of date, only absent. It is written as
`KEY.partial/` and renamed; `KEY.lock` is held meanwhile, so that a second process waits and then finds it done.
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
from qformat.errors import InvalidFileError, SourceError
from qformat.names import PARTIAL_SUFFIX
from qformat.strict_json import Json
from qformat.training.data.statistics import DataStatistics
from qformat.training.data.tokenise import Tokens

CACHE_VERSION = 1

_HEADER = "header.json"
_MAX_HEADER_NBYTES = 2**16
_DTYPES: dict[str, np.dtype[Any]] = {"tokens": np.dtype("<i4"), "trained": np.dtype("u1"), "starts": np.dtype("<i8")}


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """An open cache: read-only maps.

    tokens: int32 (n_tokens,). trained: uint8 (n_tokens,). starts: int64 (n_examples + 1,).
    """

    folder: Path
    content_digest: str
    statistics: DataStatistics
    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    starts: NDArray[np.int64]


class _Damaged(Exception):
    """A cache that does not hold what its header says; it is built again."""


def default_folder() -> Path:
    """Return `$XDG_CACHE_HOME/qformat/tokenised`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qformat" / "tokenised"


def open_cache(folder: Path, key: str, *, every_byte: bool = False) -> CachedTokens | None:
    """Map a cache, or return None where there is none or it is damaged.

    Checked are the header's digest, the sizes of all files and the digest of `starts`, by which the others are cut;
    with every_byte also the digests of the others.
    """
    try:
        return _open(folder / key, key, every_byte=every_byte)
    except (_Damaged, InvalidFileError, OSError):
        return None


@contextmanager
def locked(folder: Path, key: str, disk: Disk) -> Iterator[None]:
    """Hold the lock of a cache; wait while another process builds it. Raises TargetError: cannot be written."""
    for parent in reversed([folder, *folder.parents]):
        if not parent.is_dir():
            disk.make_folder(parent)
    descriptor = disk.open_for_writing(folder / f"{key}.lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class CacheWriter:
    """Writes a cache, example by example. The lock must be held; nothing has the final name until `finish`."""

    def __init__(self, folder: Path, key: str, disk: Disk) -> None:
        self._target = folder / key
        self._partial = folder / f"{key}{PARTIAL_SUFFIX}"
        self._key = key
        self._disk = disk
        disk.remove_folder(self._partial)  # of a run that was killed
        disk.make_folder(self._partial)
        self._pieces = {name: _Piece(self._partial / name, disk) for name in _DTYPES}
        self._n_tokens = 0
        self._pieces["starts"].append(np.zeros(1, np.int64))

    def append(self, examples: Iterable[Tokens]) -> None:
        """Add examples."""
        batch = list(examples)
        if not batch:
            return
        ends = self._n_tokens + np.cumsum([len(example.ids) for example in batch])
        self._pieces["tokens"].append(np.concatenate([example.ids for example in batch]))
        self._pieces["trained"].append(np.concatenate([example.trained for example in batch]))
        self._pieces["starts"].append(ends)
        self._n_tokens = int(ends[-1])

    def finish(self, statistics: DataStatistics, content_digest: str) -> None:
        """Bring everything to the disk and give it its name."""
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
        self._disk.remove_folder(self._target)  # a damaged one; whoever has it mapped keeps what is mapped
        self._disk.rename(self._partial, self._target)
        self._disk.sync_folder(self._target.parent)

    def close(self) -> None:
        """Let go of the files and remove what is unfinished."""
        for piece in self._pieces.values():
            piece.close()
        self._disk.remove_folder(self._partial)


class _Piece:
    """One file of a cache in the making, hashed while it is written."""

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
    """Take apart a header whose digest is right, which therefore was written above, perhaps by another version."""
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
