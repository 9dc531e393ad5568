"""The digests of an artifact (spec section 7.3): XXH3-128 a component, SHA-256 a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from qformat.artifact.reading.regular_files import read_chunks
from qformat.errors import InvalidFileError

READ_NBYTES = 4 * 2**20
"""Bytes read at a time while hashing: large enough for the disk, small enough to stay in the L3 cache."""

Buffer = bytes | bytearray | memoryview | NDArray[Any]


class Xxh3:
    """A running XXH3-128."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: Buffer) -> None:
        """Add bytes."""
        self._state.update(data.data if isinstance(data, np.ndarray) else data)

    def hexdigest(self) -> str:
        """Return the canonical (big-endian) digest as 32 lower-case hexadecimal digits."""
        return self._state.hexdigest()


def xxh3(data: Buffer) -> str:
    """Return the XXH3-128 of bytes in memory."""
    state = Xxh3()
    state.update(data)
    return state.hexdigest()


def xxh3_of_range(descriptor: int, start: int, stop: int, *, path: Path, error: type[InvalidFileError]) -> str:
    """Return the XXH3-128 of bytes [start, stop) of an open file."""
    state = Xxh3()
    for _, part in read_chunks(descriptor, start, stop, chunk_nbytes=READ_NBYTES, path=path, error=error):
        state.update(part)
    return state.hexdigest()


def sha256_of_file(descriptor: int, nbytes: int, *, path: Path, error: type[InvalidFileError]) -> str:
    """Return the SHA-256 of the first `nbytes` of an open file."""
    state = hashlib.sha256()
    for _, part in read_chunks(descriptor, 0, nbytes, chunk_nbytes=READ_NBYTES, path=path, error=error):
        state.update(part)
    return state.hexdigest()
