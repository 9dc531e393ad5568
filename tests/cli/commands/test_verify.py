"""`qformat verify`: what it prints, what it writes, and how it exits."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qformat.artifact.reading.manifest_parser import parse as parse_manifest
from qformat.cli.commands.check.verify import command
from qformat.cli.display import echo_findings
from qformat.cli.main import run
from qformat.converters.convert import convert
from qformat.names import MANIFEST_NAME
from tests.small_models import llama_config, llama_tensors, write_checkpoint, write_llama

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    convert(write_llama(folder / "source"), folder / "out")
    return folder


@pytest.fixture
def source(made: Path) -> Path:
    return made / "source"


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def verify(*arguments: str | Path) -> Result:
    """Run the command; errors of qformat itself are for the table of commands to show."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def facts_of(*arguments: str | Path, exit_code: int = 0) -> dict[str, Any]:
    result = verify(*arguments, "--json")
    assert result.exit_code == exit_code
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    assert isinstance(facts, dict)
    return facts


def damage(artifact: Path) -> None:
    """Flip a bit of a packed weight or a scale: the last bytes of the only shard belong to one."""
    data = bytearray((artifact / SHARD).read_bytes())
    data[-1] ^= 1
    (artifact / SHARD).write_bytes(data)


def test_an_intact_artifact_passes(artifact: Path) -> None:
    result = verify(artifact)
    assert result.exit_code == 0
    assert "intact" in result.stdout
    assert result.stdout.splitlines()[-1] == "passed"
    assert result.stderr == ""  # no progress without a terminal


def test_a_passed_comparison_shows_kinds_and_counts(artifact: Path, source: Path) -> None:
    result = verify(artifact, "--source", source)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    rows = [line.split()[0] for line in lines if line.strip().endswith(tuple("0123456789")) and "%" in line]
    assert rows == ["down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj", "all"]
    assert "codes and scales match the recipe: 14 of 14" in lines
    assert "kept tensors identical: 7 of 7" in lines
    assert "source tensors match the manifest's digests: 21 of 21" in lines
    assert lines[-1] == "passed"


def test_a_damaged_artifact_exits_with_1_and_names_the_tensor(artifact: Path) -> None:
    damage(artifact)
    result = verify(artifact)
    assert result.exit_code == 1
    (finding,) = (line for line in result.stdout.splitlines() if line.startswith("component_digest: "))
    assert "tensor 'model." in finding
    assert "DAMAGED" in result.stdout
    assert result.stdout.splitlines()[-1] == "FAILED: 1 finding"


def test_another_source_exits_with_1(artifact: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", llama_tensors(seed=1000), config=llama_config())
    result = verify(artifact, "--source", other)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert result.stdout.count("source_mismatch: ") == 5
    assert lines[-2:] == ["... and 16 more (--json lists all)", "FAILED: 21 findings"]
    findings = facts_of(artifact, "--source", other, exit_code=1)["findings"]
    assert [finding["reason"] for finding in findings] == ["source_mismatch"] * 21


def test_every_reason_shows_its_first_findings(capsys: pytest.CaptureFixture[str]) -> None:
    echo_findings([("codes_mismatch", "q"), *(("source_mismatch", str(n)) for n in range(6)), ("codes_mismatch", "v")])
    assert capsys.readouterr().out.splitlines() == [
        "codes_mismatch: q",
        "codes_mismatch: v",
        *(f"source_mismatch: {n}" for n in range(5)),
        "... and 1 more (--json lists all)",
    ]


def test_json_is_one_object_with_everything(artifact: Path, source: Path) -> None:
    facts = facts_of(artifact, "--source", source)
    assert facts["passed"] is True
    assert facts["findings"] == []
    assert facts["integrity"] == {
        "passed": True,
        "n_files": 8,
        "nbytes": facts["integrity"]["nbytes"],
        "sha256_checked": False,
        "signature_checked": False,
    }
    assert facts["manifest"]["recipe"]["defaults"] == {"block_size": 64, "double_quant": True}
    comparison = facts["comparison"]
    assert (comparison["n_exact"], comparison["n_packed"]) == (14, 14)
    assert (comparison["n_identical"], comparison["n_kept"]) == (7, 7)
    assert len(comparison["packed"]) == 14
    assert {kind["kind"] for kind in comparison["by_kind"]} >= {"q_proj", "up_proj"}
    assert sum(comparison["code_counts"]) == comparison["overall"]["n_weights"]
    assert 0.05 < comparison["overall"]["relative_rms"] < 0.15
    assert set(facts["seconds"]) == {"integrity", "comparison"}


def test_json_without_a_source_has_no_comparison(artifact: Path) -> None:
    facts = facts_of(artifact, "--sha256")
    assert facts["comparison"] is None
    assert facts["integrity"]["sha256_checked"] is True


def test_json_of_a_damaged_artifact_has_its_findings(artifact: Path, source: Path) -> None:
    damage(artifact)
    facts = facts_of(artifact, "--source", source, exit_code=1)
    assert facts["passed"] is False
    reasons = [finding["reason"] for finding in facts["findings"]]
    assert reasons == ["component_digest", "codes_mismatch"]
    assert facts["comparison"]["n_exact"] == 13


def test_json_does_not_depend_on_the_number_of_threads(artifact: Path, source: Path) -> None:
    one, three = (facts_of(artifact, "--source", source, "--workers", workers) for workers in ("1", "3"))
    del one["seconds"], three["seconds"]
    assert one == three


@pytest.mark.parametrize("what", ["nothing", "no manifest", "broken manifest", "broken header"])
def test_an_artifact_that_cannot_be_opened_is_a_finding_not_a_crash(artifact: Path, source: Path, what: str) -> None:
    if what == "nothing":
        artifact = artifact / "nothing"
    elif what == "no manifest":
        (artifact / "qformat.json").unlink()
    elif what == "broken manifest":
        (artifact / "qformat.json").write_bytes(b"{")
    else:
        data = bytearray((artifact / SHARD).read_bytes())
        data[0] ^= 255
        (artifact / SHARD).write_bytes(data)
    facts = facts_of(artifact, "--source", source, exit_code=1)
    assert facts["findings"]
    assert facts["comparison"] is None
    if what == "nothing":
        return
    result = verify(artifact, "--source", source)
    assert result.exit_code == 1
    assert "not compared, because the artifact cannot be opened" in result.stdout


@pytest.mark.parametrize(("name", "problem"), [("nothing", "does not exist"), (MANIFEST_NAME, "is not a directory")])
def test_a_path_without_an_artifact_is_one_error(
    artifact: Path, tmp_path: Path, name: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.html"
    assert run(["verify", str(artifact / name), "--report", str(report)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{artifact / name}: {problem}" in shown.err
    assert not report.exists()
    (finding,) = facts_of(artifact / name, exit_code=1)["findings"]
    assert finding["reason"] == "missing_file"
    assert problem in finding["message"]


def test_the_report_is_written_whether_the_check_passes_or_not(artifact: Path, source: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = verify(artifact, "--source", source, "--report", report)
    assert result.exit_code == 0
    assert f"report: {report}" in result.stdout
    good = report.read_text(encoding="utf-8")
    assert good.startswith("<!DOCTYPE html>")
    assert "model.layers.1.mlp.up_proj.weight" in good
    damage(artifact)
    assert verify(artifact, "--source", source, "--report", report).exit_code == 1
    assert "codes_mismatch" in report.read_text(encoding="utf-8")


def test_the_report_of_a_verification_without_source_is_written(artifact: Path, tmp_path: Path) -> None:
    assert verify(artifact, "--report", tmp_path / "report.html").exit_code == 0
    assert "Not compared with a source" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_fails_before_any_work(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(artifact), "--report", str(tmp_path / "no folder" / "report.html")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(["verify", str(artifact), "--report", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_a_report_is_never_written_into_an_artifact_or_its_source(
    artifact: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (artifact, source):
        report = folder / "model.safetensors"
        assert run(["verify", str(artifact), "--source", str(source), "--report", str(report)]) == 2
        assert "lies inside" in capsys.readouterr().err
    assert verify(artifact, "--source", source).exit_code == 0


@pytest.mark.parametrize(
    "arguments", [[], ["ART", "--workers", "0"], ["ART", "--workers", "x"], ["ART", "--no-such-option"], ["ART", "B"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert verify(*arguments).exit_code == 2


def test_a_source_that_is_not_a_checkpoint_exits_with_1_and_says_why(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(artifact), "--source", str(tmp_path / "nothing")]) == 1
    assert "nothing: does not exist" in capsys.readouterr().err


def test_an_artifact_given_as_its_own_source_is_rejected(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(artifact), "--source", str(artifact)]) == 1
    assert "is already a qformat artifact" in capsys.readouterr().err


def test_control_characters_of_a_manifest_do_not_reach_the_terminal(artifact: Path, source: Path) -> None:
    path = artifact / MANIFEST_NAME
    manifest = parse_manifest(path.read_bytes(), path)
    tensors = {**manifest.tensors, "model.\x1b[31m\a": manifest.tensors["model.norm.weight"]}
    path.write_bytes(dataclasses.replace(manifest, tensors=tensors).to_bytes())
    result = verify(artifact, "--source", source)
    assert result.exit_code == 1
    assert r"model.\x1b[31m\x07" in result.stdout
    assert not set("\x1b\a") & set(result.stdout)


def test_help_has_an_example_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from qformat.cli.main import run; run(['verify', '--help'])\n"
        "assert not {'numpy', 'numba', 'torch', 'tqdm', 'xxhash'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "qformat verify SmolLM2-135M-Instruct-nf4 --source SmolLM2-135M-Instruct" in shown


def test_the_name_of_an_additional_file_cannot_write_to_the_terminal(artifact: Path) -> None:
    (artifact / "evil\x1b[2J\npassed").write_text("")
    printed = verify(artifact).output
    assert "\x1b" not in printed
    assert r"evil\x1b[2J\npassed: is not in the manifest" in printed
    assert printed.splitlines()[-1] == "FAILED: 1 finding"
