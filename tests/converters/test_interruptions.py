"""Faults while an artifact is written, SQLite style: at every single call to the disk, one after another.

Whatever happens, OUT is absent, the old artifact or the complete new one; and the same command then ends with the
bytes of a run that nothing disturbed, with nothing left over.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qformat
from qformat.artifact.disk import Disk
from qformat.artifact.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, ConversionSummary, convert
from qformat.errors import Reason, SourceError, TargetError
from tests.small_models import (
    contents,
    llama_tensors,
    names_beside,
    tiny_tensors,
    weight,
    write_checkpoint,
    write_llama,
    write_tiny,
)

ROOT = Path(__file__).resolve().parents[2]
PRIMITIVES = sorted(name for name in dir(Disk) if name.startswith("raw_"))


class Killed(BaseException):
    """The process is gone: nothing that it does after this reaches the disk."""


class FaultyDisk(Disk):
    """A disk that does something else at the `fail_at`-th call of a primitive. fsync is counted, but not waited for."""

    def __init__(self, fail_at: int = -1, fault: str = "none") -> None:
        super().__init__()
        self.n_calls = 0
        self._fail_at = fail_at
        self._fault = fault
        self._dead = self._full = self._stuck = False
        self._lock = threading.Lock()

    def intercept(self, name: str, arguments: tuple[object, ...]) -> object:
        with self._lock:
            number = self.n_calls
            self.n_calls += 1
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
        if self._full and name in {"raw_mkdir", "raw_open", "raw_pwrite", "raw_write"}:
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
        return None if name == "raw_fsync" else getattr(Disk, name)(self, *arguments)

    def die(self) -> None:
        """What happens to the disk at the moment of the kill."""


def _intercepted(name: str) -> Callable[..., object]:
    return lambda self, *arguments: self.intercept(name, arguments)


for primitive in PRIMITIVES:
    setattr(FaultyDisk, primitive, _intercepted(primitive))


class PowerCut(FaultyDisk):
    """At the kill, part of what was written since each file's last fsync is lost: zeroed, cut off, or the whole file."""

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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("interruptions") / "source", n_shards=2)


OPTIONS = ConversionOptions(max_shard_nbytes=2000)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a conversion that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(source, out, OPTIONS, disk=FaultyDisk())
    assert verify_integrity(out, sha256=True).good
    return contents(out)


@pytest.fixture(scope="module")
def old(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of another artifact, with one file more, to be replaced."""
    out = tmp_path_factory.mktemp("old") / "out"
    convert(source, out, ConversionOptions(block_size=128, double_quant=False), disk=FaultyDisk())
    assert verify_integrity(out, sha256=True).good
    (out / "a_note_of_the_user.txt").write_text("mine")
    return contents(out)


def place(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def count_calls(source: Path, out: Path, *, workers: int, force: bool) -> int:
    disk = FaultyDisk()
    convert(source, out, OPTIONS, workers=workers, force=force, disk=disk)
    return disk.n_calls


def check_and_repeat(
    source: Path, out: Path, *, workers: int, force: bool, old: dict[str, bytes] | None, whole: dict[str, bytes]
) -> None:
    """What stands under OUT after a fault is the old or the new; the same command then ends as if nothing had happened."""
    standing = contents(out) if out.exists() else None
    assert standing in (old, whole)
    try:
        convert(source, out, OPTIONS, workers=workers, force=force, disk=FaultyDisk())
    except TargetError as refused:
        # The fault came behind the very last mark of the finished run: it is as if the command were given twice.
        assert standing == whole
        assert not force
        assert "exists already" in str(refused)
    assert contents(out) == whole
    assert names_beside(out) == {out.name}


TARGETS = pytest.mark.parametrize("replacing", [False, True], ids=["new OUT", "replacing an artifact"])
WORKERS = pytest.mark.parametrize("workers", [1, 3])


@TARGETS
@WORKERS
@pytest.mark.parametrize(
    "fault", ["kill", "ENOSPC", "full from here on", "EIO", "short write", "nothing written from here on"]
)
def test_a_fault_at_any_call_leaves_the_old_or_the_new_artifact_and_a_repetition_gives_the_same_bytes(
    fault: str,
    workers: int,
    replacing: bool,
    source: Path,
    whole: dict[str, bytes],
    old: dict[str, bytes],
    tmp_path: Path,
) -> None:
    before = old if replacing else None
    rehearsal = place(tmp_path / "rehearsal" / "out", old) if replacing else tmp_path / "out"
    n_calls = count_calls(source, rehearsal, workers=workers, force=replacing)
    assert n_calls > 60
    for k in range(n_calls):
        parent = tmp_path / str(k)
        parent.mkdir()
        out = place(parent / "out", old) if replacing else parent / "out"
        disk = FaultyDisk(k, fault)
        try:
            convert(source, out, OPTIONS, workers=workers, force=replacing, disk=disk)
        except Killed:
            assert fault == "kill"
        except TargetError as refused:
            assert fault not in {"kill", "short write"}
            assert str(parent) in str(refused)
            if fault in {"ENOSPC", "full from here on"}:
                assert "bytes are needed" in str(refused)
                assert "are free" in str(refused)
        else:
            # Only a write can be short; a number of calls that is not reached is no fault at all.
            assert "from here on" in fault or fault == "short write" or disk.n_calls <= k
            assert contents(out) == whole
        check_and_repeat(source, out, workers=workers, force=replacing, old=before, whole=whole)


@TARGETS
@WORKERS
def test_a_power_cut_at_any_call_that_loses_unsynced_bytes_is_repaired_by_the_repetition(
    workers: int, replacing: bool, source: Path, whole: dict[str, bytes], old: dict[str, bytes], tmp_path: Path
) -> None:
    rehearsal = place(tmp_path / "rehearsal" / "out", old) if replacing else tmp_path / "out"
    n_calls = count_calls(source, rehearsal, workers=workers, force=replacing)
    for k in range(n_calls):
        parent = tmp_path / str(k)
        parent.mkdir()
        out = place(parent / "out", old) if replacing else parent / "out"
        with pytest.raises(Killed):
            convert(source, out, OPTIONS, workers=workers, force=replacing, disk=PowerCut(k, seed=k))
        check_and_repeat(
            source, out, workers=workers, force=replacing, old=old if replacing else None, whole=whole
        )


def test_a_second_and_a_third_kill_during_the_repetition_change_nothing(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    n_calls = count_calls(source, tmp_path / "out", workers=1, force=False)
    for k in range(0, n_calls, 5):
        parent = tmp_path / str(k)
        parent.mkdir()
        out = parent / "out"
        for repetition in range(3):
            with pytest.raises((Killed, TargetError)):
                convert(source, out, OPTIONS, workers=1, disk=PowerCut(k, seed=k + repetition))
                raise TargetError("finished before the kill")  # noqa: TRY301
            assert not out.exists() or contents(out) == whole
        check_and_repeat(source, out, workers=1, force=False, old=None, whole=whole)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_without_an_exchange_of_names_a_kill_at_any_call_still_loses_neither_artifact(
    code: int, source: Path, whole: dict[str, bytes], old: dict[str, bytes], tmp_path: Path
) -> None:
    """The old artifact is moved aside before the new one takes its name: for one moment OUT is absent, never mixed."""

    class NoExchange(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name == "raw_exchange":
                raise OSError(code, os.strerror(code))
            return super().perform(name, arguments)

    rehearsal = NoExchange()
    convert(source, place(tmp_path / "r" / "out", old), OPTIONS, workers=1, force=True, disk=rehearsal)
    assert contents(tmp_path / "r" / "out") == whole
    n_absent = 0
    for k in range(rehearsal.n_calls // 2, rehearsal.n_calls):
        out = place(tmp_path / str(k) / "out", old)
        with pytest.raises(Killed):
            convert(source, out, OPTIONS, workers=1, force=True, disk=NoExchange(k, "kill"))
        if not out.exists():
            n_absent += 1
            assert contents(out.with_name("out.partial") / "replaced") == old
        else:
            assert contents(out) in (old, whole)
        convert(source, out, OPTIONS, workers=1, force=True, disk=NoExchange())
        assert contents(out) == whole
        assert names_beside(out) == {"out"}
    assert n_absent == 1
