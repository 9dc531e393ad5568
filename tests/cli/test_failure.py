"""Every command with `--json` prints one object if it fails, and nothing else on stdout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qformat import errors
from qformat.cli.main import COMMANDS, run
from qformat.cli.messages import failure_record
from qformat.converters.convert import convert
from qformat.errors import Option, QformatError, Reason, SourceError
from tests.small_models import write_llama

MEMBERS = {"reason", "file", "tensor", "field", "message", "next_step"}

ON_A_MISSING_FOLDER: dict[str, list[str]] = {
    "convert": ["missing", "out"],
    "tune": ["missing", "out", "--source", "missing", "--data", "missing.jsonl"],
    "export": ["missing", "out", "--to", "bf16"],
    "verify": ["./missing", "--revision", "main"],
    "eval": ["missing", "--data", "missing.jsonl"],
    "inspect": ["missing"],
    "diff": ["./missing", "./missing"],
    "seal": ["missing"],
    "generate": ["missing", "--prompt", "a"],
    "info": ["--backend", "missing"],
    "train": ["missing", "out", "--data", "missing.jsonl"],
    "publish": ["missing", "owner/name"],
    "fetch": ["./missing", "out"],
}


def failure(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the members of the object on stdout, after a check of its form."""
    shown = capsys.readouterr()
    assert shown.err
    found = json.loads(shown.out)
    assert found.keys() == {"error"}
    assert found["error"].keys() == MEMBERS
    assert all(value is None or isinstance(value, str) for value in found["error"].values())
    return found["error"]  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_table_has_every_command() -> None:
    assert ON_A_MISSING_FOLDER.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", ON_A_MISSING_FOLDER)
def test_a_failure_is_an_object(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, *ON_A_MISSING_FOLDER[command], "--json"]) in (1, 2)
    found = failure(capsys)
    assert "missing" in found["message"]
    assert found["reason"]


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_usage_is_an_object(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--nonsense", "--json"]) == 2
    found = failure(capsys)
    assert found["reason"] == "usage"
    assert "--nonsense" in found["message"]
    assert found["next_step"] == f"See qformat {command} --help"


@pytest.mark.parametrize("command", COMMANDS)
def test_without_json_nothing_is_printed_on_stdout(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, *ON_A_MISSING_FOLDER[command]]) in (1, 2)
    assert capsys.readouterr().out == ""


def damage_config(artifact: Path) -> None:
    (artifact / "config.json").write_text("{")


def edit_manifest(artifact: Path) -> None:
    (artifact / "qformat.json").write_text((artifact / "qformat.json").read_text().replace("nf4", "nf5", 1))


def cut_shard(artifact: Path) -> None:
    os.truncate(artifact / "model-00001-of-00001.safetensors", 5000)


@pytest.mark.parametrize(
    ("damage", "reason", "file"),
    [
        (damage_config, Reason.FILE_SIZE, "config.json"),
        (cut_shard, Reason.FILE_SIZE, "model-00001-of-00001.safetensors"),
        (edit_manifest, Reason.MANIFEST_DIGEST, "qformat.json"),
    ],
)
def test_a_damaged_artifact_is_named_with_reason_file_and_next_step(
    damage: Callable[[Path], None],
    reason: Reason,
    file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    convert(write_llama(tmp_path / "source"), tmp_path / "nf4")
    damage(tmp_path / "nf4")
    assert run(["export", "nf4", "out", "--to", "bf16", "--json"]) == 1
    found = failure(capsys)
    assert (found["reason"], found["file"]) == (reason.value, f"nf4/{file}")
    assert found["next_step"]
    assert found["message"].endswith(found["next_step"])


def test_an_interruption_is_an_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qformat.cli.commands.check.verify.verified", stopped)
    assert run(["verify", str(tmp_path), "--json"]) == 130
    assert failure(capsys)["reason"] == "interrupted"


def test_options_in_messages_are_flags_and_names_are_utf_8() -> None:
    problem = SourceError(
        Reason.NONFINITE_WEIGHT,
        "/a/\udcff.safetensors",
        "is inf",
        tensor="t",
        field="f",
        next_step=("Keep it with ", Option("keep_nonfinite", True)),
    )
    found = failure_record(problem)["error"]
    assert found == {
        "reason": "nonfinite_weight",
        "file": "/a/\\udcff.safetensors",
        "tensor": "t",
        "field": "f",
        "message": "/a/\\udcff.safetensors: tensor 't': field 'f': is inf. Keep it with --keep-nonfinite",
        "next_step": "Keep it with --keep-nonfinite",
    }


def classes(base: type[QformatError]) -> list[type[QformatError]]:
    return [found for kind in base.__subclasses__() for found in (kind, *classes(kind))]


@pytest.mark.parametrize("kind", [kind for kind in classes(QformatError) if kind.__module__ == errors.__name__])
def test_every_class_of_errors_has_a_reason(kind: type[QformatError]) -> None:
    structured = {
        errors.InvalidFileError: lambda made: made(Reason.TRUNCATED, "file", "is cut"),
        errors.DataError: lambda made: made("empty", "file", "is empty", place="line 1", next_step="Correct it"),
        errors.HubError: lambda made: made("owner/name", "is gone", next_step="Check the name"),
    }
    make = next(
        (made for base, made in structured.items() if issubclass(kind, base)), lambda made: made("Problem. Step")
    )
    found: Any = failure_record(make(kind))["error"]
    assert found["reason"]
    assert found["message"]
