"""Faults at every call to the disk, and kills: the target is the old or the new one, and a retry completes it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.converters.export import export, plan_export
from qformat.converters.sources.chunks import ChunkSizes
from qformat.errors import TargetError
from tests.converters.decode.exports import exported, kill_after
from tests.converters.faulty_disk import FaultyDisk, Killed, PowerCut, place
from tests.repository import ROOT
from tests.small_models import contents, names_beside, write_llama
from tests.standstill import wait_until_held


@pytest.mark.parametrize("n_done", range(5))
def test_a_resumed_export_writes_only_what_the_journal_lacks(n_done: int, tiny: Path, tmp_path: Path) -> None:
    kill_after(tiny, tmp_path / "out", n_done=n_done)
    lines: list[bytes] = []

    class Counting(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name == "raw_write":
                lines.append(bytes(arguments[1]))  # type: ignore[call-overload]
            return super().perform(name, arguments)

    done: list[int] = []
    resumed = exported(tiny, tmp_path / "out", disk=Counting(), on_progress=done.append)
    assert sum(b'"tensor":' in line for line in lines) == 5 - n_done
    assert sum(done) == plan_export(tiny, "bf16").tensor_nbytes
    assert resumed == exported(tiny, tmp_path / "undisturbed")


def test_staged_bytes_that_do_not_match_the_journal_are_written_again(tiny: Path, tmp_path: Path) -> None:
    work = kill_after(tiny, tmp_path / "out", n_done=4)
    for path in (work / "folder").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    assert exported(tiny, tmp_path / "out") == exported(tiny, tmp_path / "undisturbed")


TARGET = pytest.mark.parametrize("replacing", [False, True], ids=["new OUT", "replacing a checkpoint"])


class Rehearsal:
    """Shared state of the fault tests: the artifact, the bytes before and after, and the number of calls."""

    def __init__(self, artifact: Path, folder: Path, *, replacing: bool) -> None:
        self.artifact = artifact
        self.replacing = replacing
        self.old = {**exported(artifact, folder / "old", "fp32"), "note.txt": b"mine"} if replacing else None
        self.whole = exported(artifact, folder / "whole")
        disk = FaultyDisk()
        out = self.target(folder / "rehearsal")
        exported(artifact, out, disk=disk, force=replacing, workers=1)
        self.names = disk.names

    def target(self, parent: Path) -> Path:
        parent.mkdir()
        return place(parent / "out", self.old) if self.old is not None else parent / "out"

    def check_and_repeat(self, out: Path) -> None:
        standing = contents(out) if out.exists() else None
        assert standing in (self.old, self.whole)
        refused: TargetError | None = None
        try:
            exported(self.artifact, out, force=self.replacing)
        except TargetError as caught:
            refused = caught
        if refused is not None:
            # The fault came behind the very last mark of the finished run: it is as if the command were given twice.
            assert standing == self.whole
            assert "already exists" in str(refused)
        assert contents(out) == self.whole
        assert names_beside(out) == {"out"}


@TARGET
@pytest.mark.parametrize("fault", ["kill", "ENOSPC", "full from here on", "EIO", "short write"])
def test_a_fault_at_any_call_leaves_the_old_or_the_new_and_a_retry_gives_the_same_bytes(
    fault: str, replacing: bool, tiny: Path, tmp_path: Path
) -> None:
    rehearsal = Rehearsal(tiny, tmp_path, replacing=replacing)
    assert len(rehearsal.names) > 40
    for k, call in enumerate(rehearsal.names):
        if "write" in fault and "write" not in call:
            continue  # only a write can be short
        out = rehearsal.target(tmp_path / str(k))
        failure: BaseException | None = None
        try:
            exported(tiny, out, disk=FaultyDisk(k, fault), force=replacing, workers=1)
        except (Killed, TargetError) as caught:
            failure = caught
        if fault == "short write":
            assert failure is None
        elif isinstance(failure, TargetError):
            assert str(out.parent) in str(failure)
            assert fault != "kill"
        else:
            assert fault in {"kill", "full from here on"}
        rehearsal.check_and_repeat(out)


@TARGET
def test_a_power_cut_at_any_call_that_loses_unsynced_bytes_is_repaired_by_a_retry(
    replacing: bool, tiny: Path, tmp_path: Path
) -> None:
    rehearsal = Rehearsal(tiny, tmp_path, replacing=replacing)
    for k in range(len(rehearsal.names)):
        out = rehearsal.target(tmp_path / str(k))
        for repetition in range(2):
            with contextlib.suppress(Killed, TargetError):
                exported(tiny, out, disk=PowerCut(k, seed=k + repetition), force=replacing, workers=1)
        rehearsal.check_and_repeat(out)


def test_an_early_sync_that_fails_is_an_error(tiny: Path, tmp_path: Path) -> None:
    """The kernel reports a lost write to one fsync only, so an error in the syncing thread must not be lost."""

    class LostWrite(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            import threading

            if name == "raw_fsync" and threading.current_thread().name == "qformat-sync":
                raise OSError(5, "Input/output error")
            return super().perform(name, arguments)

    with pytest.raises(TargetError, match="Input/output error"):
        exported(tiny, tmp_path / "out", disk=LostWrite(), sizes=ChunkSizes(sync_nbytes=1))
    assert not (tmp_path / "out").exists()
    assert exported(tiny, tmp_path / "out") == exported(tiny, tmp_path / "undisturbed")


KILLED_EXPORT = """
import sys
from pathlib import Path
from qformat.converters.export import export
from tests.standstill import hold_writes

hold_writes(after=int(sys.argv[3]))
export(Path(sys.argv[1]), Path(sys.argv[2]), "bf16", max_shard_nbytes=9000)
"""


@pytest.mark.parametrize("n_writes", [0, 9, 20])
def test_a_killed_export_resumes_and_gives_the_same_bytes(n_writes: int, tmp_path: Path) -> None:
    convert(write_llama(tmp_path / "source"), tmp_path / "artifact")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_EXPORT, tmp_path / "artifact", out, str(n_writes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_until_held(process)
        process.kill()
    assert not out.exists()
    assert (tmp_path / "out.partial" / "journal").exists()
    export(tmp_path / "artifact", out, "bf16", max_shard_nbytes=9000)
    export(tmp_path / "artifact", tmp_path / "undisturbed", "bf16", max_shard_nbytes=9000)
    assert contents(out) == contents(tmp_path / "undisturbed")
