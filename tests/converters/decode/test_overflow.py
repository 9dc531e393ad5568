"""Values that exceed the range of the target format are counted per tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformat.codec.floats import FloatFormat, widen
from qformat.converters.convert import ConversionOptions, convert
from qformat.converters.export import export
from tests.converters.decode.exports import SHARD_NBYTES, kill_after, tensors_in
from tests.small_models import tensor_of, tiny_tensors, weight, write_checkpoint


def overflowing(folder: Path, **options: Any) -> Path:
    """Write an artifact with values beyond 65504 in a packed and in a kept tensor, and with one infinite value."""
    values = widen(np.frombuffer(weight((4, 64)).data, "<u2"), FloatFormat.BF16).reshape(4, 64).copy()
    values[1, 5], values[1, 6], values[3, 7] = 1e5, -1e5, 7e4
    norm = np.array([1, 2e5, np.inf, -3e38], np.float32)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": tensor_of(values, "BF16"),
        "model.layers.0.mlp.down_proj.weight": weight((4, 64)),
        "model.norm.weight": tensor_of(norm, "F32"),
    }
    convert(
        write_checkpoint(folder / "source", tensors, config={"architectures": ["LlamaForCausalLM"]}),
        folder / "artifact",
        ConversionOptions(**options),
    )
    return folder / "artifact"


@pytest.mark.parametrize("double_quant", [True, False])
def test_values_too_large_for_fp16_are_counted_per_tensor(double_quant: bool, tmp_path: Path) -> None:
    artifact = overflowing(tmp_path, double_quant=double_quant)
    summary = export(artifact, tmp_path / "out", "fp16")
    bits = np.frombuffer(tensors_in(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"][2], "<u2")
    n_infinite = int(((bits & 0x7FFF) == 0x7C00).sum())
    assert n_infinite >= 3
    assert summary.overflowed == {"model.layers.0.mlp.up_proj.weight": n_infinite, "model.norm.weight": 2}
    for to in ("bf16", "fp32"):
        assert export(artifact, tmp_path / to, to).overflowed == {}


def test_float32_values_too_large_for_bf16_are_counted(tmp_path: Path) -> None:
    norm = tensor_of(np.array([3.4e38, 3.38e38, 1], np.float32), "F32")
    source = write_checkpoint(
        tmp_path / "source",
        {**tiny_tensors(), "model.norm.weight": norm},
        config={"architectures": ["LlamaForCausalLM"]},
    )
    convert(source, tmp_path / "artifact")
    assert export(tmp_path / "artifact", tmp_path / "out", "bf16").overflowed == {"model.norm.weight": 1}


def test_a_resumed_export_still_reports_overflows(tmp_path: Path) -> None:
    artifact = overflowing(tmp_path)
    expected = export(artifact, tmp_path / "undisturbed", "fp16").overflowed
    kill_after(artifact, tmp_path / "out", n_done=3, to="fp16")
    assert export(artifact, tmp_path / "out", "fp16", max_shard_nbytes=SHARD_NBYTES).overflowed == expected
