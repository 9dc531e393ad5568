"""`qformat train` and `generate --adapter` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qformat.cli.main import run
from qformat.errors import TargetError
from qformat.report import training_page
from tests.training import runs
from tests.training.conftest import _cache_of_its_own, _one_thread  # noqa: F401

SHORT = "--max-steps 2 --batch-size 2 --grad-accum 1 --seq-len 64 --rank 4 --device cpu --save-every 1".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_artifact(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    return runs.write_examples(tmp_path / "examples.jsonl", 8)


def train(artifact: Path, data: Path, output: Path, *options: str) -> int:
    return run(["train", str(artifact), str(output), "--data", str(data), *SHORT, *options])


def test_a_training_reports_its_progress_and_writes_a_report(
    artifact: Path,
    examples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert train(artifact, examples, tmp_path / "out", "--eval-data", str(examples)) == 0
    shown = capsys.readouterr()
    first = "First example («trained tokens»):\n"
    for says in ("8 examples", first, "evaluation: loss", "step 1/2  loss", "step 2/2  loss", "tokens/s"):
        assert says in shown.err
    assert "loss on held-out data" in shown.out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "loss on the training data at the last logged step" in page
    assert "http" not in page.replace("http-equiv", "")
    assert train(artifact, examples, tmp_path / "out") == 1
    assert "--resume" in capsys.readouterr().err
    capsys.readouterr()
    assert train(artifact, examples, tmp_path / "out", "--eval-data", str(examples), "--resume", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["steps"], record["statistics"]["examples"], record["settings"]["rank"]) == (2, 8, 4)
    assert record["loss_before"] > 0
    assert record["loss_after"] > 0

    def refuse(text: str, path: Path) -> None:
        raise TargetError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(training_page, "write_document", refuse)
    assert train(artifact, examples, tmp_path / "out", "--eval-data", str(examples), "--resume=checkpoint-1") == 1
    said = capsys.readouterr().err
    assert "report.html: cannot be written: No space left on device. The adapter in" in said
    assert "is complete, only its report is missing" in said
    assert "--resume=latest" in said


def test_an_adapter_generates_on_its_own_artifact_only(
    artifact: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "out"
    assert train(artifact, examples, adapter) == 0
    ask = ["--adapter", str(adapter), "--prompt", "the block", "--max-new-tokens", "3", "--device", "cpu", "--json"]
    capsys.readouterr()
    assert run(["generate", str(artifact), *ask]) == 0
    assert json.loads(capsys.readouterr().out)["n_new_tokens"] <= 3
    other = runs.make_artifact(tmp_path, seed=1)
    assert run(["generate", str(other), *ask]) == 1
    assert "was trained on" in capsys.readouterr().err
    assert run(["generate", str(other), *ask, "--force-adapter"]) == 0


def test_the_command_line_takes_precedence_over_the_file(artifact: Path, examples: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.toml"
    config.write_text("rank = 2\nalpha = 5.0\n")
    assert train(artifact, examples, tmp_path / "out", "--config", str(config)) == 0
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 5.0)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--data", "no.jsonl"], 2, "no.jsonl: does not exist"),
        (["--rank", "0"], 2, "rank: 0"),
        (["--epochs", "1"], 2, "exclude each other"),
        (["--target-modules", "nowhere"], 2, "nowhere"),
        (["--report-to", "nothing"], 2, "nothing"),
        (["--resume"], 2, "has no checkpoint to resume from"),
        (["--eval-every", "1"], 2, "--eval-data"),
        (["--modules-to-save", "q_proj"], 2, "4-bit"),
    ],
    ids=str,
)
def test_wrong_usage_is_explained(
    artifact: Path,
    examples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    says: str,
) -> None:
    assert train(artifact, examples, tmp_path / "out", *options) == code
    assert says in capsys.readouterr().err


def test_an_invalid_line_is_named_and_can_be_skipped(
    artifact: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with examples.open("a") as file:
        file.write("{broken\n")
    assert train(artifact, examples, tmp_path / "out") == 1
    assert f"{examples}: line 9" in capsys.readouterr().err
    assert train(artifact, examples, tmp_path / "out", "--skip-bad-lines") == 0
    assert "not_json: 1" in capsys.readouterr().err


def test_a_damaged_artifact_is_rejected(
    artifact: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "nothing", examples, tmp_path / "out") == 1
    assert "nothing" in capsys.readouterr().err


def test_a_dry_run_shows_the_memory_and_reads_no_data(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(artifact), "--dry-run", "--seq-len", "64", "--device-memory", "2GiB"]) == 0
    told = capsys.readouterr().out
    for row in ("weights", "adapters", "optimizer states", "activations", "peak", "largest batch", "longest sequence"):
        assert f"\n{row}" in f"\n{told}"
    assert "fits" in told
    source = artifact.parent / "source"
    assert run(["train", str(source), "--dry-run", "--seq-len", "64"]) == 0
    assert "largest batch" not in capsys.readouterr().out
    assert run(["train", str(artifact), "--dry-run", "--seq-len", "64", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is None
    assert plan["peak"] == max(plan[phase] for phase in ("forward", "loss_peak", "backward", "step_peak"))
    assert run(["train", str(artifact), "--dry-run", "--device-memory", "much"]) == 2
    assert "--device-memory 'much'" in capsys.readouterr().err


def test_an_interrupted_training_explains_how_to_resume(
    artifact: Path,
    examples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qformat.training.run.train", stopped)
    assert train(artifact, examples, tmp_path / "out") == 130
    assert "Interrupted. Add --resume to the same command" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "missing"), [(["out"], "--data"), (["--data", "x.jsonl"], "OUT")])
def test_a_training_needs_data_and_an_output(
    artifact: Path, capsys: pytest.CaptureFixture[str], options: list[str], missing: str
) -> None:
    assert run(["train", str(artifact), *options]) == 2
    assert missing in capsys.readouterr().err
