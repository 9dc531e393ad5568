"""`qformat export`: what it prints, its options and exit codes, and that a dry run shows what a run writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.cli.main import run
from tests.small_models import contents, names_beside, tensor_of, tiny_tensors, write_checkpoint, write_llama


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    qformat.convert(write_llama(tmp_path / "source"), tmp_path / "artifact")
    return tmp_path / "artifact"


def test_it_ends_with_sizes_time_and_rate(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(artifact), str(tmp_path / "out"), "--to", "bf16"]) == 0
    shown = capsys.readouterr()
    assert "decode       14" in shown.out
    assert "->" in shown.out.splitlines()[-1]
    assert shown.out.splitlines()[-1].endswith("B/s written")
    assert "Warning" not in shown.err


def test_a_dry_run_shows_the_exact_size_and_writes_nothing(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = names_beside(out)
    options = ["export", str(artifact), str(out), "--to", "fp32", "--max-shard-size", "20KB"]
    assert run([*options, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert run([*options, "--dry-run"]) == 0
    assert str(out / "model-00001-of-") in capsys.readouterr().out
    assert names_beside(out) == before
    assert run(options) == 0
    assert facts["nbytes"] == sum(len(data) for data in contents(out).values())
    shards = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert {shard["name"]: shard["nbytes"] for shard in facts["shards"]} == shards
    assert len(shards) > 2
    assert facts["fits"] is True


def test_json_is_one_object(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(artifact), str(tmp_path / "out"), "--to", "fp16", "--json", "--workers", "3"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"] == {"decode": 14, "cast": 7, "copy": 0}
    assert facts["dtype"] == "F16"
    assert facts["overflowed"] == {}


def test_an_overflow_is_a_warning_that_names_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norm = tensor_of(np.array([1e6, 1.0], np.float32), "F32")
    source = write_checkpoint(
        tmp_path / "source",
        {**tiny_tensors(), "model.norm.weight": norm},
        config={"architectures": ["LlamaForCausalLM"]},
    )
    qformat.convert(source, tmp_path / "artifact")
    assert run(["export", str(tmp_path / "artifact"), str(tmp_path / "out"), "--to", "fp16"]) == 0
    warning = capsys.readouterr().err
    assert "Warning: 1 values are too large for fp16 and became infinite, in model.norm.weight (1)" in warning


def test_an_existing_checkpoint_needs_force(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(artifact), str(tmp_path / "out"), "--to", "bf16"]
    assert run(command) == 0
    assert run(command) == 1
    assert "--force" in capsys.readouterr().err
    assert run([*command, "--force"]) == 0


def test_a_damaged_artifact_exits_with_1_without_a_traceback(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(iter(artifact.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = names_beside(tmp_path / "out") | {"out.partial"}
    assert run(["export", str(artifact), str(tmp_path / "out"), "--to", "bf16"]) == 1
    message = capsys.readouterr().err
    assert "was changed: XXH3-128" in message
    assert path.name in message
    assert "Traceback" not in message
    assert names_beside(tmp_path / "out") == before


def test_a_folder_that_is_not_an_artifact_exits_with_1(artifact: Path, tmp_path: Path) -> None:
    assert run(["export", str(tmp_path / "source"), str(tmp_path / "out"), "--to", "bf16"]) == 1
    assert run(["export", str(tmp_path / "nothing"), str(tmp_path / "out"), "--to", "bf16"]) == 1


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--to", "int8"],
        ["--to", "bf16", "--workers", "0"],
        ["--to", "bf16", "--max-shard-size", "0"],
        ["--to", "bf16", "--max-shard-size", "five"],
    ],
)
def test_invalid_options_are_wrong_usage(
    options: list[str], artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(artifact), str(tmp_path / "out"), *options]) == 2
    assert ("--max-shard-size 'five'" in capsys.readouterr().err) == ("five" in options)
    assert not (tmp_path / "out").exists()
