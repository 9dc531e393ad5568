"""`qformat generate` and `qformat info` on the real model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qformat.cli.main import run
from qformat.converters.convert import convert
from qformat.kernels.backends import VARIABLE

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def artifact(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "nf4"
    convert(smollm2, out)
    return out


@pytest.fixture(autouse=True)
def _same_backend_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, os.environ.get(VARIABLE, ""))


def generate(artifact: Path, *options: str) -> int:
    return run(["generate", str(artifact), "--device", "cpu", "--prompt", PROMPT, *options])


def test_an_answer_is_streamed_and_figures_follow(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(artifact, "--chat", "--max-new-tokens", "24") == 0
    shown = capsys.readouterr()
    assert "Paris" in shown.out
    assert all(figure in shown.err for figure in ("loaded in", "first token after", "tokens/s", "peak memory"))


def test_json_holds_text_and_figures_and_nothing_else_is_printed(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(artifact, "--chat", "--max-new-tokens", "8", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n_new_tokens"] == 8
    assert "France" in facts["text"]
    assert facts["tokens_per_s"] > 0
    assert facts["peak_nbytes"] > 10**8


def test_a_seed_repeats_a_sample_and_another_gives_another(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert generate(artifact, "--chat", "--temperature", "1.5", "--seed", seed, "--max-new-tokens", "12") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "triton"], "cannot run here"),
        (["--backend", "abacus"], "must be one of numba, triton, torch"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_wrong_usage_exits_with_2(
    artifact: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(artifact, *options) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_damaged_artifact_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "nothing") == 1
    assert "nothing: does not exist. Check the path" in capsys.readouterr().err


def test_info_names_devices_backends_reasons_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("torch 2", "cpu: ", "dequantize_nf4", "numba", "the fastest for this device"))
    assert run(["info", "--backend", "torch", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {row["backend"] for row in facts["operations"] if row["device"] == "cpu"} == {"torch"}
    assert run(["info", "--backend", "triton"]) == 2
