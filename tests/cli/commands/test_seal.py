"""`qformat seal`: what it prints, its exit codes and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qformat.cli.main import run
from qformat.converters.convert import convert
from tests.small_models import write_tiny

TOKENIZER = "tokenizer_config.json"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    convert(write_tiny(tmp_path / "source", side_files=("LICENSE", TOKENIZER)), tmp_path / "artifact")
    return tmp_path / "artifact"


def test_changes_are_shown_then_accepted(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["seal", str(artifact)]) == 0
    assert capsys.readouterr().out == f"{artifact}: every file matches the manifest, nothing to accept\n"

    nbytes = (artifact / TOKENIZER).stat().st_size
    (artifact / TOKENIZER).write_text("{}\n")
    (artifact / "README.md").write_text("# A model\n")
    assert run(["verify", str(artifact)]) == 1
    shown = capsys.readouterr().out
    assert f"file_size: {artifact / TOKENIZER}: the file has 3 bytes, expected {nbytes}" in shown
    assert "accept the change with `qformat seal`" in shown
    notice = f"notice: {artifact / 'README.md'}: is not in the manifest, but it only accompanies the model"
    assert notice in shown

    assert run(["seal", str(artifact), "--original", str(tmp_path / "source")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "added: README.md, 10 bytes"
    assert lines[1] == f"changed: {TOKENIZER}, {nbytes} -> 3 bytes"
    assert "+{}" in lines
    assert lines[-1].endswith(f"2 files to accept, weights intact. To accept: qformat seal {artifact} --accept")

    assert run(["seal", str(artifact), "--accept"]) == 0
    assert capsys.readouterr().out.endswith(f"{artifact}: accepted 2 files, weights intact\n")
    assert run(["verify", str(artifact)]) == 0
    assert "notice" not in capsys.readouterr().out


def test_the_json_has_every_change(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "model.sig").write_text("{}")
    (artifact / "LICENSE").unlink()
    assert run(["seal", str(artifact), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    (change,) = facts.pop("changes")
    assert change.pop("before")["nbytes"] > 0
    assert change == {"file": "LICENSE", "kind": "removed", "accompanies": True, "after": None}
    assert facts == {
        "path": str(artifact),
        "accepted": False,
        "signature_outdated": True,
        "evaluation_removed": False,
    }
    assert run(["seal", str(artifact), "--accept"]) == 0
    assert "model.sig does not cover the change" in capsys.readouterr().err


def test_notices_are_in_the_json_and_the_report_of_verify(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact / "README.md").write_text("# A model\n")
    report = tmp_path / "report.html"
    assert run(["verify", str(artifact), "--json", "--report", str(report)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"]
    assert facts["findings"] == []
    assert [(one["reason"], one["file"]) for one in facts["notices"]] == [("extra_file", "README.md")]
    text = report.read_text()
    assert "<h2>Notices</h2>" in text
    assert "Passed" in text
