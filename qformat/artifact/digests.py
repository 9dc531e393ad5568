"""Digests of an artifact: XXH3-128 per component and SHA-256 per file (spec section 7.3)."""

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
"""Number of bytes to read at a time for hashing: large enough for the disk, small enough for the L3 cache."""

Buffer = bytes | bytearray | memoryview | NDArray[Any]


class Xxh3:
    """XXH3-128 digest of data that arrives in parts."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: Buffer) -> None:
        """Add bytes to the digest."""
        self._state.update(data.data if isinstance(data, np.ndarray) else data)

    def hexdigest(self) -> str:
        """Return the digest in canonical (big-endian) form, as 32 lower-case hexadecimal digits."""
        return self._state.hexdigest()


def xxh3(data: Buffer) -> str:
    """Return the XXH3-128 of bytes in memory."""
    state = Xxh3()
    state.update(data)
    return state.hexdigest()


def xxh3_of_range(descriptor: int, start: int, stop: int, *, path: Path, error: type[InvalidFileError]) -> str:
    """Return the XXH3-128 of a byte range of an open file.

    Args:
        descriptor: File descriptor.
        start: Offset of the first byte.
        stop: Offset after the last byte.
        path: Path of the file, for error messages.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The range cannot be read (truncated, unreadable). The class is `error`.
    """
    state = Xxh3()
    for _, part in read_chunks(descriptor, start, stop, chunk_nbytes=READ_NBYTES, path=path, error=error):
        state.update(part)
    return state.hexdigest()


def sha256_of_file(descriptor: int, nbytes: int, *, path: Path, error: type[InvalidFileError]) -> str:
    """Return the SHA-256 of the beginning of an open file.

    Args:
        descriptor: File descriptor.
        nbytes: Number of bytes to hash.
        path: Path of the file, for error messages.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The file cannot be read (truncated, unreadable). The class is `error`.
    """
    state = hashlib.sha256()
    for _, part in read_chunks(descriptor, 0, nbytes, chunk_nbytes=READ_NBYTES, path=path, error=error):
        state.update(part)
    return state.hexdigest()
