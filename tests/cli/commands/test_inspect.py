"""`qformat inspect`: artifacts, plain checkpoints, single tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.cli.main import run
from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import unpack
from tests.small_models import write_llama

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return qformat.convert(write_llama(tmp_path / "source"), tmp_path / "out").out


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, object]:
    assert run(["inspect", *map(str, arguments), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert isinstance(facts, dict)
    return facts


def test_an_artifact_shows_version_source_recipe_and_every_tensor(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = inspect(capsys, artifact)
    assert facts["format_version"] == "1.0"
    assert facts["source"]["kind"] == "safetensors"
    assert facts["recipe"]["defaults"] == {"block_size": 64, "double_quant": True}
    with qformat.open(artifact) as opened:
        assert [entry["name"] for entry in facts["tensors"]] == list(opened)
    assert facts["nbytes"] + (artifact / "qformat.json").stat().st_size == sum(
        path.stat().st_size for path in artifact.iterdir()
    )


def test_a_packed_tensor_shows_components_digests_histogram_and_values(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = inspect(capsys, artifact, "--tensor", NAME)
    with qformat.open(artifact) as opened:
        tensor = opened[NAME]
        assert isinstance(tensor, qformat.PackedTensor)
        codes = unpack(tensor.packed, n_elements=tensor.layout.n_elements)
        decoded = tensor.decode(FloatFormat.F32).reshape(-1)
    assert facts["code_counts"] == np.bincount(codes, minlength=16).tolist()
    assert facts["values"] == pytest.approx(decoded[:8].tolist(), rel=1e-6)
    assert {part["component"] for part in facts["components"]} == {
        "packed", "absmax", "nested_absmax", "nested_quant_map", "quant_map", "quant_state",
    }  # fmt: skip
    for part in facts["components"]:
        assert len(part["xxh3"]) == 32


def test_the_table_for_people_has_a_line_for_every_tensor(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(artifact)]) == 0
    shown = capsys.readouterr().out
    with qformat.open(artifact) as opened:
        for name in opened:
            assert f"\n{name} " in shown
    assert run(["inspect", str(artifact), "--tensor", NAME]) == 0
    assert "first values:" in capsys.readouterr().out


def test_a_kept_tensor_shows_its_values(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(capsys, artifact, "--tensor", "model.norm.weight")
    with qformat.open(artifact) as opened:
        assert facts["values"] == pytest.approx(opened["model.norm.weight"].decode()[:8].tolist())


def test_a_plain_checkpoint_shows_its_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(capsys, write_llama(tmp_path / "plain", n_shards=2))
    assert {entry["encoding"] for entry in facts["tensors"]} == {"plain"}
    assert NAME in {entry["name"] for entry in facts["tensors"]}


def test_an_unknown_tensor_names_the_nearest_ones(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(artifact), "--tensor", "model.layers.1.mlp.up_porj.weight"]) == 2
    assert NAME in capsys.readouterr().err


def test_a_folder_that_is_neither_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_broken_link_in_place_of_the_manifest_is_named(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "qformat.json").unlink()
    (artifact / "qformat.json").symlink_to("nowhere")
    assert run(["inspect", str(artifact)]) == 1
    shown = capsys.readouterr().err
    assert "qformat.json: is a symbolic link to " in shown
    assert "already" not in shown
