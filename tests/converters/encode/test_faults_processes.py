"""Real processes: killed with SIGKILL, stopped with SIGINT, or writing the same OUT at the same time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.errors import TargetError
from tests.repository import ROOT
from tests.small_models import contents, names_beside, write_llama

CONVERT = """
import sys, time
from pathlib import Path
from qformat.artifact.writing.disk import Disk
from qformat.converters.convert import ConversionOptions, convert

write = Disk.raw_pwrite

def slow_write(self, descriptor, data, offset):
    time.sleep(0.02)  # so that there is something to stop
    return write(self, descriptor, data, offset)

Disk.raw_pwrite = slow_write
source, out = map(Path, sys.argv[1:3])
progress = lambda nbytes: print(nbytes, flush=True)
"""

IN_PYTHON = CONVERT + "convert(source, out, ConversionOptions(max_shard_nbytes=9000), workers=2, on_progress=progress)"
ON_THE_COMMAND_LINE = (
    CONVERT
    + """
from qformat.cli.main import main
from qformat.converters import convert as module

execute = module.execute
module.execute = lambda *arguments, **options: execute(*arguments, **{**options, "progress": progress})
main(["convert", str(source), str(out), "--max-shard-size", "9000", "--workers", "2"])
"""
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("processes") / "source", n_shards=2)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    repeat(source, out)
    return contents(out)


def repeat(source: Path, out: Path) -> None:
    from qformat.converters.convert import ConversionOptions

    convert(source, out, ConversionOptions(max_shard_nbytes=9000))


@contextmanager
def running(script: str, source: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_progress(process: subprocess.Popen[str], n_tensors: int) -> None:
    assert process.stdout is not None
    for _ in range(n_tensors):
        if not process.stdout.readline():
            assert process.stderr is not None
            pytest.fail(f"the conversion ended before it was stopped: {process.stderr.read()}")


@pytest.mark.parametrize("n_tensors", [1, 4, 9, 15, 20])
def test_a_conversion_that_is_killed_continues_and_gives_the_same_bytes(
    n_tensors: int, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(IN_PYTHON, source, out) as process:
        wait_for_progress(process, n_tensors)
        process.kill()
        process.wait()
    assert not out.exists()
    assert (tmp_path / "out.partial" / "journal").exists()
    repeat(source, out)
    assert contents(out) == whole
    assert names_beside(out) == {"out"}


def test_a_conversion_that_is_killed_again_and_again_ends_in_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for n_tensors in (3, 6, 9):
        with running(IN_PYTHON, source, out) as process:
            wait_for_progress(process, n_tensors)
            process.kill()
            process.wait()
        assert not out.exists()
    repeat(source, out)
    assert contents(out) == whole


@pytest.mark.parametrize("script", [IN_PYTHON, ON_THE_COMMAND_LINE], ids=["Python", "command line"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_conversion_stops_within_a_second_and_continues(
    number: signal.Signals, script: str, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(script, source, out) as process:
        wait_for_progress(process, 2)
        process.send_signal(number)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - sent < 1.5  # a second, and a moment for the interpreter to end
    assert not out.exists()
    if script is ON_THE_COMMAND_LINE:
        assert process.returncode == 130
        assert "Nothing is lost: the same command continues" in errors
        assert "Traceback" not in errors
    elif number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    repeat(source, out)
    assert contents(out) == whole
    assert names_beside(out) == {"out"}


def test_another_process_that_writes_the_same_out_is_not_disturbed(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(IN_PYTHON, source, out) as process:
        wait_for_progress(process, 1)
        for arguments in ({}, {"force": True}, {"restart": True}):
            with pytest.raises(TargetError, match="another process is writing there"):
                convert(source, out, **arguments)
        assert process.poll() is None
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert contents(out) == whole
    assert names_beside(out) == {"out"}
