"""`qformat eval` as a user sees it: figures, exit codes, the report and the record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import qformat
from qformat.cli.main import run
from tests.quality import models

FEW = ["--windows", "3", "--seq-len", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_source(tmp_path_factory.mktemp("eval") / "source")


@pytest.fixture(scope="module")
def artifact(source: Path) -> Path:
    return models.write_artifact(source, source.with_name("nf4"))


@pytest.fixture(scope="module")
def coarse(source: Path) -> Path:
    return models.write_artifact(source, source.with_name("coarse"), block_size=256)


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    return models.write_text(source.with_name("words.txt"))


def test_every_model_has_a_line_for_every_text(
    source: Path, artifact: Path, coarse: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = models.write_text(tmp_path / "other.txt", seed=1)
    data = ["--data", str(text), "--data", str(other)]
    assert run(["eval", str(artifact), "--source", str(source), "--against", str(coarse), *data, *FEW]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line[0] != " "][:3] == ["text", "words.txt", "other.txt"]
    assert sum("source (16-bit)" in line for line in lines) == 2
    assert sum("more than nf4" in line for line in lines) == 2
    assert all(line.count("±") >= 2 for line in lines[1:-1])


def test_json_has_the_figures_of_the_table(
    source: Path, artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(artifact), "--source", str(source), "--data", str(text), *FEW]
    assert run(arguments) == 0
    table = capsys.readouterr().out
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kl = found["texts"][0]["models"][0]["kl"]
    assert f"{kl['mean']:.4f} ± {kl['standard_error']:.4f}" in table
    assert found["texts"][0]["windows"] == 3
    assert found["source_checked"] is True


def test_the_report_names_the_worst_tokens(
    source: Path, artifact: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.html"
    arguments = ["eval", str(artifact), "--source", str(source), "--data", str(text), *FEW, "--report", str(report)]
    assert run(arguments) == 0
    page = report.read_text()
    assert page.count("<svg") == 4
    assert "Worst tokens" in page
    assert any(f"<b>{word}" in page or f"<b>␣{word}" in page for word in ("the", "block", "every", "scale", "code"))
    assert str(report) in capsys.readouterr().out


def test_a_record_is_in_the_manifest_and_the_artifact_stays_whole(
    source: Path, artifact: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    arguments = ["eval", str(copy), "--source", str(source), "--data", str(text), *FEW, "--record", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    recorded = json.loads((copy / "qformat.json").read_bytes())["evaluation"]
    assert recorded["texts"][0]["kl"] == found["texts"][0]["models"][0]["kl"]
    assert recorded["texts"][0]["sha256"] == found["texts"][0]["sha256"]
    assert qformat.verify(copy, sha256=True).passed
    once = (copy / "qformat.json").read_bytes()
    assert run(arguments) == 0
    assert (copy / "qformat.json").read_bytes() == once
    capsys.readouterr()
    assert run(["inspect", str(copy)]) == 0
    assert 'evaluation: {"window_length":64' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--record", "--any-source"], "would mislead"),
        (["--report", "/nowhere/page.html"], "there is no folder"),
        (["--windows", "0"], "--windows"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--source", "owner/unknown"], "hf download owner/unknown"),
        (["--seq-len", "129"], "has a context of 128 tokens"),
    ],
)
def test_wrong_usage_is_said_and_ends_with_2(
    arguments: list[str], says: str, artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", str(artifact), "--data", str(text), *FEW, *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_record_needs_a_manifest_and_a_report_another_folder(
    source: Path, artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", str(source), "--data", str(text), *FEW, "--record"]) == 2
    assert "no folder with a manifest" in capsys.readouterr().err
    assert run(["eval", str(artifact), "--data", str(text), *FEW, "--report", str(artifact / "page.html")]) == 2
    assert "must stay as it is" in capsys.readouterr().err


def test_data_that_is_too_short_and_another_source_end_with_1(
    artifact: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = models.write_text(tmp_path / "short.txt", n_words=2)
    assert run(["eval", str(artifact), "--data", str(short), *FEW]) == 1
    assert "fewer than one window" in capsys.readouterr().err
    other = models.write_source(tmp_path / "other", seed=3)
    assert run(["eval", str(artifact), "--data", str(text), "--source", str(other), *FEW]) == 1
    assert "is not the tensor that" in capsys.readouterr().err
