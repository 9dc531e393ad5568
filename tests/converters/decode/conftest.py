"""Artifacts to export: one with tensors of every kind, and a tiny one of two shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.converters.convert import ConversionOptions, convert
from tests.converters.decode.exports import CONFIG
from tests.small_models import Tensor, raw_tensor, tiny_tensors, weight, write_checkpoint, write_tiny


def many_kinds() -> dict[str, Tensor]:
    """Return tensors of every kind: packed and kept, other dtypes, partial and several nested blocks, empty ones."""
    return {
        **tiny_tensors(),
        "model.layers.1.self_attn.o_proj.weight": weight((300, 130), "F32", seed=6),
        "model.layers.1.mlp.down_proj.weight": weight((33, 31), "BF16", seed=7),
        "model.layers.1.input_layernorm.weight": weight((64,), "F32", seed=8),
        "model.layers.1.post_attention_layernorm.weight": weight((64,), "F16", seed=9),
        "counts": raw_tensor("I64", (5,), seed=10),
        "mask": raw_tensor("BOOL", (2, 3), seed=11),
        "eighths": raw_tensor("F8_E4M3", (7,), seed=12),
        "empty": weight((0, 4), "BF16"),
        "scalar": weight((), "F32", seed=13),
    }


@pytest.fixture(scope="module", params=[True, False], ids=["double quantization", "one level"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    source = write_checkpoint(folder / "source", many_kinds(), config={**CONFIG, "torch_dtype": "float32"})
    convert(source, folder / "artifact", ConversionOptions(double_quant=request.param, max_shard_nbytes=9000))
    return folder / "artifact"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    source = write_tiny(folder / "source", side_files=("LICENSE", "generation_config.json"))
    convert(source, folder / "artifact", ConversionOptions(max_shard_nbytes=2000))
    return folder / "artifact"
