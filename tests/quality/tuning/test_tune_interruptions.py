"""A tuning that is stopped resumes and gives the same bytes. tests/cli/faults has kills and faults of the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qformat.errors import TargetError
from qformat.quality.tuning.steps import STATE_NAME, TuningRun
from qformat.quality.tuning.tune import TuningResult
from tests.quality.tuning.tuned import run
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
