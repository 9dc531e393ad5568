"""Weights with NaN or Inf or of another dtype are rejected or kept; other tensors keep their bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import Reason, SourceError
from tests.converters.refused_source import refusal
from tests.small_models import Tensor, contents, llama_tensors, raw_tensor, tensor_of, write_checkpoint

PROJECTION = "model.layers.0.self_attn.q_proj.weight"


def with_value(shape: tuple[int, ...], position: tuple[int, ...], value: float, dtype: str) -> Tensor:
    values = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    values[position] = value
    return tensor_of(values, dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [(0, 0), (17, 5), (31, 31)])
def test_a_weight_with_nan_or_inf_is_rejected_with_tensor_and_position(
    position: tuple[int, int], value: float, dtype: str, tmp_path: Path
) -> None:
    tensors = {**llama_tensors(dtype=dtype), PROJECTION: with_value((32, 32), position, value, dtype)}
    source = write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(SourceError, match="keep_nonfinite=True") as refused:
        convert(source, tmp_path / "out")
    assert refused.value.reason is Reason.NONFINITE_WEIGHT
    assert refused.value.tensor == PROJECTION
    assert str(list(position)) in str(refused.value)
    assert str(value) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_reported_position_is_correct_beyond_the_first_chunk(tmp_path: Path) -> None:
    rows, columns = 1400, 2048  # bf16: 5.7 MB, two chunks
    data = np.zeros((rows, columns), np.uint16)
    data[1399, 2047] = 0x7FC0
    name = "model.layers.0.self_attn.o_proj.weight"
    source = write_checkpoint(tmp_path / "source", {name: Tensor("BF16", (rows, columns), data.tobytes())})
    with pytest.raises(SourceError, match=r"the weight at \[1399, 2047\] is nan"):
        convert(source, tmp_path / "out")


def test_keep_nonfinite_keeps_the_weight_and_those_fused_with_it_and_records_this_in_the_recipe(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), PROJECTION: with_value((32, 32), (3, 4), np.inf, "BF16")}
    source = write_checkpoint(tmp_path / "source", tensors)
    convert(source, tmp_path / "out", ConversionOptions(keep_nonfinite=True))
    prefix = "model.layers.0.self_attn."
    with open_artifact(tmp_path / "out") as artifact:
        kept = artifact.manifest
        for part, reason in (("q", "skipped_by_recipe"), ("k", "coupled"), ("v", "coupled")):
            record = kept.tensors[f"{prefix}{part}_proj.weight"]
            assert getattr(record, "reason", None) == reason
        assert not hasattr(kept.tensors[prefix + "o_proj.weight"], "reason")
        assert kept.recipe["rules"] == [{"pattern": prefix + "q_proj", "action": "keep"}]
        data = artifact[PROJECTION].decode()
        assert np.isinf(data[3, 4])
    skip = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {prefix + "q_proj", prefix + "k_proj", prefix + "v_proj"} <= set(skip)
    assert verify_integrity(tmp_path / "out", sha256=True).passed


def test_keep_nonfinite_changes_nothing_if_everything_is_finite(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "one")
    convert(single, tmp_path / "two", ConversionOptions(keep_nonfinite=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_infinities_in_a_kept_tensor_are_accepted(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), "model.norm.weight": with_value((32,), (3,), np.nan, "BF16")}
    convert(write_checkpoint(tmp_path / "source", tensors), tmp_path / "out")
    assert verify_integrity(tmp_path / "out").passed


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I32", "I64", "BOOL"])
def test_a_weight_of_an_unsupported_dtype_is_rejected_with_a_next_step(dtype: str, tmp_path: Path) -> None:
    tensors = {**llama_tensors(), PROJECTION: raw_tensor(dtype, (32, 32))}
    error = refusal(write_checkpoint(tmp_path / "source", tensors))
    assert error.reason is Reason.UNSUPPORTED_DTYPE
    assert error.tensor == PROJECTION
    assert error.field == "dtype"
    assert "bfloat16, float16 or float32" in str(error)


def test_buffers_of_any_dtype_and_shape_are_kept_bit_for_bit(tmp_path: Path) -> None:
    dtypes = ["BOOL", "U8", "I8", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "I64"]
    buffers = {f"model.buffer.{dtype}.{i}": raw_tensor(dtype, shape, seed=i) for dtype in dtypes for i, shape in
               enumerate([(), (0,), (1,), (3, 0, 5), (1,) * 8, (7, 3)])}  # fmt: skip
    source = write_checkpoint(tmp_path / "source", {**llama_tensors(), **buffers})
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    with open_artifact(tmp_path / "out") as artifact:
        for name, tensor in buffers.items():
            assert artifact[name].data.tobytes() == tensor.data  # type: ignore[union-attr]
            assert artifact[name].shape == tensor.shape
