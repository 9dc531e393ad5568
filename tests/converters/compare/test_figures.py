"""The figures of a comparison equal those of an independent computation, also across chunks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.artifact.reading.reader import open_artifact
from qformat.codec.floats import FloatFormat, widen
from qformat.converters.compare.compare import compare
from qformat.converters.convert import ConversionOptions, convert
from qformat.converters.sources.safetensors_shards import SafetensorsShards
from tests.converters.compare.changed_sides import NORM
from tests.small_models import llama_config, tiny_tensors, weight, write_checkpoint, write_tiny


def with_bitsandbytes(artifact: Path, name: str) -> np.ndarray:
    """Decode a packed weight with bitsandbytes, in the dtype of the weight, and widen it to float64."""
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(artifact.glob("*.safetensors")):
        tensors |= load_file(path)
    parts = {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name + ".")}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    decoded = bnb.dequantize_4bit(tensors[name], state)
    return decoded.to(torch.float64).numpy()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_figures_equal_those_of_bitsandbytes_and_torch_arithmetic(tmp_path: Path, dtype: str, block_size: int) -> None:
    # Rows of whole blocks, or of an odd size: with AVX-512, bitsandbytes 0.50.2 decodes wrongly where a row ends
    # within a block (its own codes too: 20% error instead of 9% for 576 columns in blocks of 256).
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": weight((576, 768), dtype, seed=1, scale=0.1),
        "model.layers.0.self_attn.k_proj.weight": weight((192, 768), dtype, seed=2, scale=0.1),
        "model.layers.0.self_attn.v_proj.weight": weight((193, 577), dtype, seed=3, scale=0.02),
        "model.layers.0.mlp.down_proj.weight": weight((768, 1536), dtype, seed=4),
        NORM: weight((576,), dtype, seed=5),
    }
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(n_layers=1))
    convert(source, tmp_path / "out", ConversionOptions(block_size=block_size))
    comparison = compare(tmp_path / "out", source)
    assert comparison.passed
    assert [tensor.name for tensor in comparison.kept] == [NORM]
    sums = np.zeros(4)
    for tensor in comparison.packed:
        data = tensors[tensor.name]
        float_format = FloatFormat(dtype)
        w = widen(np.frombuffer(data.data, float_format.raw_dtype), float_format).astype(np.float64)
        q = with_bitsandbytes(tmp_path / "out", tensor.name).reshape(-1)
        e = w - q
        sums += w @ w, q @ q, w @ q, e @ e
        assert tensor.errors.n_weights == w.size
        assert tensor.errors.relative_rms == pytest.approx(math.sqrt(e @ e / (w @ w)), rel=1e-12)
        assert tensor.errors.max_abs_error == pytest.approx(np.abs(e).max(), rel=1e-7)
        assert tensor.errors.cosine == pytest.approx(w @ q / math.sqrt((w @ w) * (q @ q)), rel=1e-12)
        assert tensor.errors.snr_db == pytest.approx(10 * math.log10(w @ w / (e @ e)), rel=1e-12)
        assert 0.07 < (tensor.errors.relative_rms or 0) < 0.13  # what NF4 does to normal weights
    assert comparison.overall.relative_rms == pytest.approx(math.sqrt(sums[3] / sums[0]), rel=1e-12)
    assert comparison.overall.cosine == pytest.approx(sums[2] / math.sqrt(sums[0] * sums[1]), rel=1e-12)


def test_errors_are_those_of_the_values_in_the_dtype_of_the_weight(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    convert(source, tmp_path / "out")
    comparison = compare(tmp_path / "out", source)
    with open_artifact(tmp_path / "out") as artifact:
        for tensor in comparison.packed:
            float_format = tensor.layout.float_format
            data = tiny_tensors()[tensor.name].data
            w = widen(np.frombuffer(data, float_format.raw_dtype), float_format).astype(np.float64)
            opened = artifact[tensor.name]
            assert isinstance(opened, qformat.PackedTensor)
            q = widen(opened.decode().reshape(-1), float_format).astype(np.float64)
            assert tensor.errors.errors_squared == pytest.approx(((w - q) ** 2).sum(), rel=1e-12)
            assert tensor.errors.largest_error == pytest.approx(np.abs(w - q).max(), rel=1e-7)


def test_counts_of_codes_are_those_of_the_artifact(artifact: Path, source: Path) -> None:
    comparison = compare(artifact, source)
    with open_artifact(artifact) as opened:
        for tensor in comparison.packed:
            packed = opened[tensor.name]
            assert isinstance(packed, qformat.PackedTensor)
            codes = np.stack([packed.packed >> 4, packed.packed & 15], axis=1).reshape(-1)[: packed.layout.n_elements]
            assert tensor.code_counts == tuple(np.bincount(codes, minlength=16))
    assert sum(comparison.code_counts) == comparison.overall.n_weights


def test_figures_hold_across_chunks(large: tuple[Path, Path]) -> None:
    comparison = compare(*large)
    opened = SafetensorsShards(large[1])
    with open_artifact(large[0]) as artifact:
        for tensor in comparison.packed:
            float_format = tensor.layout.float_format
            raw = np.empty(tensor.layout.n_elements, float_format.raw_dtype)
            opened.read_into(opened.tensors[tensor.name], 0, raw.data.cast("B"))
            packed = artifact[tensor.name]
            assert isinstance(packed, qformat.PackedTensor)
            w = widen(raw, float_format).astype(np.float64)
            q = widen(packed.decode().reshape(-1), float_format).astype(np.float64)
            assert tensor.errors.errors_squared == pytest.approx(((w - q) ** 2).sum(), rel=1e-11)
            assert tensor.errors.products == pytest.approx((w * q).sum(), rel=1e-11)
    opened.close()
