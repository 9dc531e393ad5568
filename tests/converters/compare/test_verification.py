"""verify_against_source: what the command prints, in a single pass over the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import qformat
from qformat.artifact.reading import manifest_parser, structure
from qformat.artifact.verification_facts import Seconds
from qformat.cli.main import run
from qformat.converters.compare.verification import Stage, verify_against_source
from qformat.converters.convert import convert
from qformat.errors import Reason
from tests.small_models import write_llama


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source")


@pytest.fixture
def artifact(source: Path, tmp_path: Path) -> Path:
    return convert(source, tmp_path / "nf4").out


def counting(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[object]:
    """Count the calls of a function of a module and forward them."""
    calls: list[object] = []
    function: Callable[..., object] = getattr(module, name)

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("with_source", [True, False])
def test_the_command_parses_the_manifest_once(
    source: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_source: bool
) -> None:
    parsed = counting(monkeypatch, manifest_parser, "parse")
    options = ["--source", str(source), "--report", str(tmp_path / "page.html")] if with_source else []
    assert run(["verify", str(artifact), "--json", *options]) == 0
    assert len(parsed) == 1


def test_headers_are_checked_once(source: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = counting(monkeypatch, structure, "check_tensors")
    assert verify_against_source(artifact, source).passed
    assert len(checked) == 1


def test_the_command_prints_the_record(source: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify_against_source(artifact, source, sha256=True)
    assert run(["verify", str(artifact), "--source", str(source), "--sha256", "--json"]) == 0
    took: Seconds = {"integrity": 0.0, "comparison": 0.0}
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("seconds").keys() == found.to_json()["seconds"].keys()
    assert {**printed, "seconds": took} == {**found.to_json(), "seconds": took}


def test_the_findings_are_those_of_both_checks(source: Path, artifact: Path) -> None:
    found = verify_against_source(artifact, source)
    assert found.integrity.findings == qformat.verify(artifact).findings
    assert found.comparison == qformat.compare(artifact, source)
    assert found.passed
    assert found.integrity.manifest is not None


def test_without_a_source_there_is_no_comparison(artifact: Path) -> None:
    found = verify_against_source(artifact, None)
    assert found.passed
    assert found.comparison is None
    assert found.to_json()["comparison"] is None


def test_an_artifact_that_cannot_be_opened_is_not_compared(source: Path, artifact: Path) -> None:
    (artifact / "config.json").write_text("{}")
    found = verify_against_source(artifact, source)
    assert not found.passed
    assert found.comparison is None
    assert [finding.reason for finding in found.findings] == [Reason.FILE_SIZE]
    assert found.to_json()["manifest"] is not None


def test_each_stage_reports_its_number_of_bytes(source: Path, artifact: Path) -> None:
    stages: list[tuple[Stage, int]] = []
    done: list[int] = []

    def on_stage(stage: Stage, nbytes: int) -> None:
        stages.append((stage, nbytes))
        done.append(0)

    def on_progress(nbytes: int) -> None:
        done[-1] += nbytes

    found = verify_against_source(artifact, source, workers=1, on_stage=on_stage, on_progress=on_progress)
    assert [stage for stage, _ in stages] == ["digests", "comparison"]
    assert found.comparison is not None
    assert stages[1][1] == found.comparison.source_nbytes == done[1]
    assert 0 < done[0] <= stages[0][1]
