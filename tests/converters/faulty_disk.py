"""A disk that fails on purpose at any single call, and helpers for tests of interrupted conversions."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from qformat.artifact.writing.disk import Disk
from qformat.converters.convert import ConversionOptions, convert
from tests.small_models import tiny_tensors

PRIMITIVES = sorted(name for name in dir(Disk) if name.startswith("raw_"))
_PERFORMED = {name: getattr(Disk, name) for name in PRIMITIVES}
"""What the primitives do, even while `tests.cli.faults` has replaced them for all disks."""


class Killed(BaseException):
    """The process was killed: nothing that it does afterwards reaches the disk."""


class FaultyDisk(Disk):
    """A disk with a fault at the `fail_at`-th call of a primitive. fsync is counted but not executed."""

    WRITING: ClassVar[frozenset[str]] = frozenset({"raw_mkdir", "raw_open", "raw_pwrite", "raw_write"})
    """Calls that need free space."""

    def __init__(self, fail_at: int = -1, fault: str = "none") -> None:
        super().__init__()
        self.n_calls = 0
        self.names: list[str] = []
        self._fail_at = fail_at
        self._fault = fault
        self._dead = self._full = self._stuck = False
        self._lock = threading.Lock()

    def intercept(self, name: str, arguments: tuple[object, ...]) -> object:
        with self._lock:
            number = self.n_calls
            self.n_calls += 1
            self.names.append(name)
            if self._dead:
                raise Killed
            faulty = number == self._fail_at
            self._full = self._full or (faulty and self._fault == "full from here on")
            self._stuck = self._stuck or (faulty and self._fault == "nothing written from here on")
            if faulty and self._fault == "kill":
                self._dead = True
                self.die()
                raise Killed
        if faulty and self._fault in {"ENOSPC", "EIO"}:
            code = getattr(errno, self._fault)
            raise OSError(code, os.strerror(code))
        if self._full and name in self.WRITING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if name in {"raw_pwrite", "raw_write"}:
            descriptor, data, *rest = arguments
            assert isinstance(data, memoryview)
            if self._stuck:
                return 0
            if faulty and self._fault == "short write":
                data = data[: max(1, len(data) // 2)]
            arguments = (descriptor, data, *rest)
        return self.perform(name, arguments)

    def perform(self, name: str, arguments: tuple[object, ...]) -> object:
        return None if name == "raw_fsync" else _PERFORMED[name](self, *arguments)

    def die(self) -> None:
        """Apply the effects of the kill to the disk."""


def _intercepted(name: str) -> Callable[..., object]:
    return lambda self, *arguments: self.intercept(name, arguments)


for primitive in PRIMITIVES:
    setattr(FaultyDisk, primitive, _intercepted(primitive))


class DiskWithRoom(Disk):
    """A disk that reports a given number of free bytes."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self._free_nbytes = nbytes

    def free_nbytes(self, path: Path) -> int:
        return self._free_nbytes


class PowerCut(FaultyDisk):
    """A disk on which a kill loses part of what was written since each file's last fsync: zeroed, cut or deleted."""

    def __init__(self, fail_at: int, seed: int) -> None:
        super().__init__(fail_at, "kill")
        self._random = random.Random(seed)
        self._unsynced: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._paths: dict[tuple[int, int], Path] = {}
        self._guard = threading.Lock()

    def perform(self, name: str, arguments: tuple[object, ...]) -> object:
        if name in {"raw_pwrite", "raw_write", "raw_fsync"}:
            descriptor = arguments[0]
            assert isinstance(descriptor, int)
            status = os.fstat(descriptor)
            key = (status.st_dev, status.st_ino)
            with self._guard:
                self._paths[key] = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                if name == "raw_fsync":
                    self._unsynced.pop(key, None)
                else:
                    data = arguments[1]
                    assert isinstance(data, memoryview)
                    start = arguments[2] if name == "raw_pwrite" else status.st_size
                    assert isinstance(start, int)
                    self._unsynced.setdefault(key, []).append((start, start + len(data)))
        return super().perform(name, arguments)

    def die(self) -> None:
        with self._guard:
            for key, ranges in self._unsynced.items():
                path = self._paths[key]
                if not path.exists():
                    continue
                fate = self._random.choice(["kept", "zeroed", "zeroed", "zeroed", "cut", "gone"])
                if fate == "gone":
                    path.unlink()
                    continue
                with path.open("r+b") as file:
                    if fate == "cut":
                        file.truncate(self._random.randrange(path.stat().st_size + 1))
                    elif fate == "zeroed":
                        for start, stop in ranges:
                            if self._random.random() < 0.5:
                                file.seek(start)
                                file.write(bytes(stop - start))


class KilledAfter(FaultyDisk):
    """A disk that kills the process once the journal has a given number of lines."""

    def __init__(self, *, n_lines: int) -> None:
        super().__init__()
        self._n_lines = n_lines

    def intercept(self, name: str, arguments: tuple[object, ...]) -> object:
        if name == "raw_write" and self.names.count("raw_write") == self._n_lines:
            self._dead = True
        return super().intercept(name, arguments)


OPTIONS = ConversionOptions(max_shard_nbytes=2000)
"""Five tensors, three shards."""

N_TENSORS = len(tiny_tensors())


def interrupt(source: Path, out: Path, *, n_done: int, options: ConversionOptions = OPTIONS) -> Path:
    """Kill a conversion when `n_done` tensors are in the journal; return the work folder."""
    disk = KilledAfter(n_lines=2 + n_done)  # what was begun, the state of the source, then one a tensor
    with pytest.raises(Killed):
        convert(source, out, options, workers=1, disk=disk)
    work = out.with_name(out.name + ".partial")
    assert journal_tensors(work) == n_done
    return work


def journal_tensors(work: Path) -> int:
    return (work / "journal").read_bytes().count(b'"tensor":')


def place(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
