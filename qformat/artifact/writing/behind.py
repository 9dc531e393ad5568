"""Threads that work behind those who write: one hashes what is still cached, one brings it to the disk."""

from __future__ import annotations

import hashlib
import heapq
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

from qformat.artifact.digests import READ_NBYTES
from qformat.artifact.reading.regular_files import read_exactly
from qformat.artifact.writing.disk import Disk
from qformat.errors import ArtifactError

_Work = TypeVar("_Work")


class BehindWriters(ABC, Generic[_Work]):
    """A thread that is told which bytes are written, and works on them until it is finished or closed."""

    def __init__(self, thread_name: str) -> None:
        self._changed = threading.Condition()
        self._finishing = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=thread_name, daemon=True)
        self._thread.start()

    def mark_written(self, name: str, start: int, stop: int) -> None:
        """Note that bytes [start, stop) of a file are written."""
        with self._changed:
            self._note(name, start, stop)
            self._changed.notify()

    def finish(self) -> None:
        """Wait until all that is left to do is done, and raise what the thread failed with."""
        with self._changed:
            self._finishing = True
            self._changed.notify()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop the thread once what it has begun is done, whatever is left."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @abstractmethod
    def _note(self, name: str, start: int, stop: int) -> None:
        """Take in that bytes are written; no other thread looks meanwhile."""

    @abstractmethod
    def _take(self, *, finishing: bool) -> _Work | None:
        """Return work that is worth doing now, None for none. finishing: no more bytes will be written."""

    @abstractmethod
    def _do(self, work: _Work) -> None:
        """Do a piece of work, while others write."""

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                self._do(work)
        except BaseException as failure:  # noqa: BLE001 - raised again by `finish`
            self._failure = failure

    def _next(self) -> _Work | None:
        with self._changed:
            while not self._stopping:
                if (work := self._take(finishing=self._finishing)) is not None:
                    return work
                if self._finishing:
                    return None
                self._changed.wait()
            return None


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


class Follower(BehindWriters[WrittenFile]):
    """Hashes `WrittenFile`s behind the threads that write them: nothing is read twice from the disk."""

    def __init__(self, files: Mapping[str, WrittenFile]) -> None:
        self._files = files
        self._buffer = memoryview(bytearray(READ_NBYTES))
        super().__init__("qformat-sha256")

    def sha256(self) -> dict[str, str]:
        """Wait until every complete file is hashed and return the SHA-256 of each file by name."""
        self.finish()
        return {name: file.hexdigest() for name, file in self._files.items()}

    def _note(self, name: str, start: int, stop: int) -> None:
        self._files[name].mark_written(start, stop)

    def _take(self, *, finishing: bool) -> WrittenFile | None:
        """Return a file worth a read: with a full buffer ready, or any byte once no more will come."""
        ready = (file for file in self._files.values() if file.pending >= (1 if finishing else READ_NBYTES))
        return next(ready, None)

    def _do(self, work: WrittenFile) -> None:
        work.hash_some(self._buffer)


class WriteBehind(BehindWriters[list[str]]):
    """Syncs files whenever another batch was written: the disk works at the same time as the CPU.

    Without it the kernel keeps gigabytes until the seal's fsync, which then waits for all of them. 2.2 GB exported on
    two cores, six runs of each in mixed order: 1.40 s with it and 2.81 s without (medians), 1.01 s and 1.26 s (best).
    What is less than a batch at the end is left to the seal. The failure of a sync must not be lost: the kernel tells
    of a lost write only once. `descriptors` and paths (below `folder`) are by name.
    """

    def __init__(self, disk: Disk, folder: Path, descriptors: Mapping[str, int], *, batch_nbytes: int) -> None:
        self._disk = disk
        self._folder = folder
        self._descriptors = descriptors
        self._batch_nbytes = batch_nbytes
        self._unsynced: dict[str, int] = {}
        super().__init__("qformat-sync")

    def _note(self, name: str, start: int, stop: int) -> None:
        self._unsynced[name] = self._unsynced.get(name, 0) + stop - start

    def _take(self, *, finishing: bool) -> list[str] | None:
        if sum(self._unsynced.values()) < self._batch_nbytes:
            return None
        names = sorted(self._unsynced)
        self._unsynced.clear()
        return names

    def _do(self, work: list[str]) -> None:
        for name in work:
            self._disk.sync(self._descriptors[name], self._folder / name)
