"""Exports that are killed resume, and give the same bytes. tests/cli/faults has the faults of the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.converters.export import export, plan_export
from qformat.converters.sources.chunks import ChunkSizes
from qformat.errors import TargetError
from tests.converters.decode.exports import exported, kill_after
from tests.converters.faulty_disk import FaultyDisk
from tests.repository import ROOT
from tests.small_models import contents, write_llama
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


@pytest.mark.parametrize("n_writes", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 20))])
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
