"""A tuning that is stopped, killed or out of disk resumes and gives the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qformat.errors import TargetError
from qformat.quality.tuning.steps import STATE_NAME, TuningRun
from qformat.quality.tuning.tune import TuningResult
from tests.converters.faulty_disk import FaultyDisk
from tests.quality.tuning.tuned import run
from tests.repository import ROOT
from tests.small_models import contents, names_beside


class _Stop(Exception):
    pass


@pytest.mark.parametrize("at", [7, pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_stopped_tuning_resumes_and_gives_the_same_bytes(
    at: int, result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    def stop(line: Any) -> None:
        if line.step == at:
            raise _Stop

    with pytest.raises(_Stop):
        run(artifact, source, text, tmp_path / "out", on_step=stop)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    run(artifact, source, text, tmp_path / "out", on_step=lambda line: steps.append(line.step))
    assert steps == list(range(5 if at > 4 else 1, 9))
    assert contents(tmp_path / "out") == contents(result.out)
    assert names_beside(tmp_path / "out") == {"out"}


@pytest.mark.parametrize(("damaged", "repeated_from"), [([8], 5), pytest.param([4, 8], 1, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named_and_its_steps_are_repeated(
    damaged: list[int],
    repeated_from: int,
    result: TuningResult,
    artifact: Path,
    source: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(_: TuningRun) -> None:
        raise _Stop

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TuningRun, "bring_back_best", stop)
        with pytest.raises(_Stop):
            run(artifact, source, text, out)
    for step in damaged:
        path = tmp_path / "out.partial" / "tuning" / f"checkpoint-{step}" / STATE_NAME
        path.write_bytes(path.read_bytes()[:-1])
    steps: list[int] = []
    said: list[str] = []
    run(artifact, source, text, out, say=said.append, on_step=lambda line: steps.append(line.step))
    assert steps == list(range(repeated_from, 9))
    for step in damaged:
        assert [f"checkpoint-{step}/{STATE_NAME}: is damaged" in line for line in said].count(True) == 1
    assert not any("resume=" in line for line in said), "tune has no such option"
    assert contents(out) == contents(result.out)


TUNE = """
import sys, torch
from pathlib import Path
from tests.quality.tuning.tuned import run
torch.set_num_threads(1)
run(*map(Path, sys.argv[1:5]), on_step=lambda line: print(line.step, flush=True))
"""


def test_a_killed_process_is_resumed(
    result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", TUNE, *map(str, (artifact, source, text, tmp_path / "out"))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 6:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    run(artifact, source, text, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result.out)


@pytest.mark.parametrize(
    "share", [0.5, 0.9, *(pytest.param(share, marks=pytest.mark.slow) for share in (0, 0.1, 0.3, 0.7, 0.99))]
)
def test_a_full_disk_is_reported_and_nothing_is_lost(
    share: float, result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    counting = FaultyDisk()
    run(artifact, source, text, tmp_path / "counted", disk=counting)
    writing = {"raw_pwrite", "raw_write", "raw_open", "raw_mkdir"}
    calls = [number for number, name in enumerate(counting.names) if name in writing]
    number = calls[int(share * len(calls))]
    with pytest.raises(TargetError, match="Free some space and run the same command again"):
        run(artifact, source, text, tmp_path / "out", disk=FaultyDisk(number, "full from here on"))
    assert not (tmp_path / "out").exists()
    run(artifact, source, text, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result.out)


def test_other_settings_do_not_resume_a_tuning(artifact: Path, source: Path, text: Path, tmp_path: Path) -> None:
    def stop(line: Any) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        run(artifact, source, text, tmp_path / "out", on_step=stop)
    with pytest.raises(TargetError, match="restart=True"):
        run(artifact, source, text, tmp_path / "out", steps=3)
    found = run(artifact, source, text, tmp_path / "out", steps=3, restart=True)
    assert found is not None
    assert found.step == 3
