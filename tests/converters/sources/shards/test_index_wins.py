"""Shards with more tensors than their index: rejected, or read as the index says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qformat.artifact.reading.verify import verify_integrity
from qformat.cli.main import run
from qformat.converters.compare.compare import compare
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import Reason, SourceError
from tests.converters.refused_source import refusal
from tests.small_models import INDEX, write_llama, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

INDEX_WINS = ConversionOptions(index_wins=True)
SHARD = "model-00001-of-00001.safetensors"
FIRST, SECOND = "model-00001-of-00003", "model-00002-of-00003"


def as_torch(source: Path) -> Path:
    """Store the same shards as PyTorch files."""
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {
        name: shard.replace("model", "pytorch_model").replace("safetensors", "bin")
        for name, shard in index["weight_map"].items()
    }
    for path in source.glob("*.safetensors"):
        torch.save(load_file(path), source / f"pytorch_{path.stem}.bin")
        path.unlink()
    (source / INDEX).unlink()
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return source


def unlisted(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    first["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


def overlaid(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    name = next(iter(second))
    first[name] = torch.zeros_like(second[name])


def overlaid_by_an_earlier_one(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    name = next(iter(first))
    second[name] = torch.zeros_like(first[name])


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None], Reason]] = {
    "a tensor that the index does not list": (unlisted, Reason.INDEX_MISMATCH),
    "a stale copy in an earlier shard": (overlaid, Reason.DUPLICATE_TENSOR),
    "a stale copy in a later shard": (overlaid_by_an_earlier_one, Reason.DUPLICATE_TENSOR),
}


@pytest.mark.parametrize("kind", ["safetensors", "torch_bin"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_index_decides_on_demand_which_tensors_count(change: str, kind: str, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", n_shards=3)
    convert(source, tmp_path / "expected")
    alter, reason = CHANGES[change]
    shards = [load_file(source / f"{name}.safetensors") for name in (FIRST, SECOND)]
    alter(*shards)
    for name, tensors in zip((FIRST, SECOND), shards, strict=True):
        save_file(tensors, source / f"{name}.safetensors")
    if kind == "torch_bin":
        as_torch(source)
    error = refusal(source)
    assert error.reason is reason
    assert "index_wins=True" in str(error.next_step)

    summary = convert(source, tmp_path / "converted", INDEX_WINS)
    assert (tmp_path / "converted" / SHARD).read_bytes() == (tmp_path / "expected" / SHARD).read_bytes()
    assert any("left out of a shard, because" in note for note in summary.plan.notes)
    assert summary.plan.source["index_wins"] is True
    assert verify_integrity(tmp_path / "converted").passed
    assert compare(tmp_path / "converted", source).passed
    assert run(["verify", str(tmp_path / "converted"), "--source", str(source)]) == 0


def test_a_single_file_beside_an_index_is_ignored_on_demand(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", n_shards=3)
    convert(source, tmp_path / "expected")
    (source / "model.safetensors").write_bytes((source / f"{FIRST}.safetensors").read_bytes())
    assert "index_wins=True" in str(refusal(source).next_step)
    convert(source, tmp_path / "converted", INDEX_WINS)
    assert (tmp_path / "converted" / SHARD).read_bytes() == (tmp_path / "expected" / SHARD).read_bytes()


def test_a_tensor_of_the_index_that_its_shard_lacks_is_rejected_all_the_same(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = next(name for name, shard in index["weight_map"].items() if shard == f"{FIRST}.safetensors")
    index["weight_map"][name] = f"{SECOND}.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(SourceError) as refused:
        convert(sharded, sharded.with_name("out"), INDEX_WINS)
    assert refused.value.reason is Reason.INDEX_MISMATCH
    assert refused.value.tensor == name


def test_without_an_index_the_option_changes_nothing(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    convert(source, tmp_path / "out", INDEX_WINS)
    assert compare(tmp_path / "out", source).passed
