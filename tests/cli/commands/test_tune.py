"""`qformat tune` on the command line: figures, JSON, progress, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qformat.cli.main import run
from tests.quality import models

SHORT = [
    "--steps",
    "6",
    "--batch-size",
    "4",
    "--seq-len",
    "32",
    "--held-out",
    "8",
    "--learning-rate",
    "0.01",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    models.write_artifact(models.write_source(folder / "source"), folder / "nf4")
    models.write_text(folder / "text.txt")
    return folder


def arguments(made: Path, out: Path) -> list[str]:
    return [
        "tune",
        str(made / "nf4"),
        str(out),
        "--source",
        str(made / "source"),
        "--data",
        str(made / "text.txt"),
        *SHORT,
    ]


def test_it_prints_what_was_gained(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(made, tmp_path / "out")) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["before", "tuned", "as"]
    assert f"{tmp_path / 'out'}: after 6 steps, 768 tokens, " in lines[4]
    assert "8 held-out windows: KL" in told.err
    assert "step 6/6  KL " in told.err
    assert run(["verify", str(tmp_path / "out"), "--source", str(made / "source")]) == 0
    told = capsys.readouterr()
    assert "codes, and scales within 50%, as the recipe gives: 14 of 14" in told.out
    assert "kept tensors tuned, as the manifest says: model.layers.0.input_layernorm.weight and 4 others" in told.out


def test_json_has_the_figures_with_their_errors(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments(made, tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["after"]["kl"]["mean"] < facts["before"]["kl"]["mean"]
    assert facts["after"]["kl"]["standard_error"] > 0
    assert {"before", "before_rounding", "after", "step", "tokens", "seconds", "peak_memory_nbytes", "out"} == set(
        facts
    )


def test_wrong_usage_and_bad_input_have_their_exit_codes(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", str(made / "nf4"), str(tmp_path / "out")]) == 2
    assert run([*arguments(made, tmp_path / "out"), "--batch-size", "0"]) == 2
    assert "--batch-size: 0, expected at least 1" in capsys.readouterr().err
    other = models.write_source(tmp_path / "other", seed=3)
    command = arguments(made, tmp_path / "out")
    command[command.index("--source") + 1] = str(other)
    assert run(command) == 1
    assert "is not the tensor that nf4 was converted from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
