"""Real processes: killed with SIGKILL, stopped with SIGINT, or writing the same OUT at the same time."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.errors import TargetError
from tests.repository import ROOT
from tests.small_models import contents, names_beside, write_llama
from tests.standstill import GUARD_S, go_on, wait_until_held

CONVERT = """
import sys
from pathlib import Path
from qformat.cli.main import main
from qformat.converters.convert import ConversionOptions, convert
from tests.standstill import hold_writes

source, out = map(Path, sys.argv[1:3])
hold_writes(after=int(sys.argv[3]))
"""

IN_PYTHON = CONVERT + "convert(source, out, ConversionOptions(max_shard_nbytes=9000), workers=2)"
ON_THE_COMMAND_LINE = (
    CONVERT + 'main(["convert", *sys.argv[1:3], "--max-shard-size", "9000", "--workers", "2", "--no-model-check"])'
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
def running(script: str, source: Path, out: Path, *, n_writes: int) -> Iterator[subprocess.Popen[str]]:
    """Run a conversion whose threads stop in a write after `n_writes` writes."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(out), str(n_writes)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def n_journaled(out: Path) -> int:
    return (out.with_name("out.partial") / "journal").read_bytes().count(b"\n")


@pytest.mark.parametrize("n_writes", [20, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 7, 35, 44))])
def test_a_killed_conversion_resumes_and_gives_the_same_bytes(
    n_writes: int, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(IN_PYTHON, source, out, n_writes=n_writes) as process:
        wait_until_held(process)
        process.kill()
        process.wait()
    assert not out.exists()
    assert (tmp_path / "out.partial" / "journal").exists()
    repeat(source, out)
    assert contents(out) == whole
    assert names_beside(out) == {"out"}


def test_a_conversion_that_is_killed_repeatedly_gives_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for n_writes in (8, 16, 4):
        with running(IN_PYTHON, source, out, n_writes=n_writes) as process:
            wait_until_held(process)
            process.kill()
            process.wait()
        assert not out.exists()
    repeat(source, out)
    assert contents(out) == whole


@pytest.mark.parametrize("script", [IN_PYTHON, ON_THE_COMMAND_LINE], ids=["Python", "command line"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_conversion_stops_promptly_and_resumes(
    number: signal.Signals, script: str, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(script, source, out, n_writes=5) as process:
        wait_until_held(process, n_threads=2)
        n_before = n_journaled(out)
        process.send_signal(number)
        _, errors = process.communicate(timeout=GUARD_S)
        assert n_journaled(out) <= n_before + 2  # each thread may end the tensor that it is at
    assert not out.exists()
    if script is ON_THE_COMMAND_LINE:
        assert process.returncode == 130
        assert "Run the same command again to continue" in errors
        assert "Traceback" not in errors
    elif number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    repeat(source, out)
    assert contents(out) == whole
    assert names_beside(out) == {"out"}


def test_another_process_that_writes_the_same_output_is_not_disturbed(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with running(IN_PYTHON, source, out, n_writes=3) as process:
        wait_until_held(process)
        for arguments in ({}, {"force": True}, {"restart": True}):
            with pytest.raises(TargetError, match="another process is writing to it"):
                convert(source, out, **arguments)
        assert process.poll() is None
        go_on(process)
        process.communicate(timeout=GUARD_S)
        assert process.returncode == 0
    assert contents(out) == whole
    assert names_beside(out) == {"out"}
