"""The digests of an artifact (spec section 7.3): XXH3-128 a component, SHA-256 a file, followed while it is written."""

from __future__ import annotations

import hashlib
import heapq
import threading
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from qformat.artifact.reading.regular_files import read_chunks, read_exactly
from qformat.errors import ArtifactError, InvalidFileError

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


class WrittenFile:
    """A file that is filled in any order and hashed in order, behind the writers, while its bytes are still cached."""

    def __init__(self, path: Path, descriptor: int, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._descriptor = descriptor
        self._state = hashlib.sha256()
        self._hashed = 0
        self._ready = 0
        self._ahead: list[tuple[int, int]] = []

    def mark_written(self, start: int, stop: int) -> None:
        """Note that bytes [start, stop) are in the file."""
        heapq.heappush(self._ahead, (start, stop))
        while self._ahead and self._ahead[0][0] <= self._ready:
            self._ready = max(self._ready, heapq.heappop(self._ahead)[1])

    @property
    def pending(self) -> int:
        """Bytes that could be hashed now."""
        return self._ready - self._hashed

    @property
    def complete(self) -> bool:
        """Whether every byte was hashed."""
        return self._hashed == self.nbytes

    def hash_some(self, buffer: memoryview) -> None:
        """Read and hash at most one buffer of what is ready."""
        part = buffer[: min(len(buffer), self.pending)]
        read_exactly(self._descriptor, self._hashed, part, path=self.path, error=ArtifactError)
        self._state.update(part)
        self._hashed += len(part)

    def hexdigest(self) -> str:
        """Return the SHA-256 of the complete file."""
        assert self.complete, f"{self.path}: {self._hashed} of {self.nbytes} bytes hashed"
        return self._state.hexdigest()


class Follower:
    """A thread that hashes `WrittenFile`s behind the threads that write them: nothing is read twice from the disk."""

    def __init__(self, files: dict[str, WrittenFile]) -> None:
        self._files = files
        self._changed = threading.Condition()
        self._finishing = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="qformat-sha256", daemon=True)
        self._thread.start()

    def mark_written(self, name: str, start: int, stop: int) -> None:
        """Note that bytes [start, stop) of the file are written."""
        with self._changed:
            self._files[name].mark_written(start, stop)
            self._changed.notify()

    def finish(self) -> dict[str, str]:
        """Wait until every complete file is hashed and return the SHA-256 of each file by name."""
        with self._changed:
            self._finishing = True
            self._changed.notify()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return {name: file.hexdigest() for name, file in self._files.items()}

    def close(self) -> None:
        """Stop the thread at once, whatever is ready."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        buffer = memoryview(bytearray(READ_NBYTES))
        try:
            while (file := self._next_file()) is not None:
                file.hash_some(buffer)
        except InvalidFileError as failure:
            self._failure = failure

    def _next_file(self) -> WrittenFile | None:
        """Wait for a file worth a read: a full buffer ready, or any byte once it is certain that no more will come."""
        with self._changed:
            while not self._stopping:
                for file in self._files.values():
                    if file.pending >= READ_NBYTES or (file.pending and self._finishing):
                        return file
                if self._finishing:
                    return None
                self._changed.wait()
            return None
