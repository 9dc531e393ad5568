"""FP8 checkpoints: decoded as transformers does it, then converted like the same checkpoint in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.converters.convert import convert, plan
from qformat.converters.sources.open_source import open_source
from qformat.errors import Reason, SourceError
from tests.converters.sources.decoded_kinds import FP8, fp8, read, scales, write_fp8
from tests.small_models import Tensor, contents, llama_tensors, write_checkpoint

PROJECTION = "model.layers.0.mlp.up_proj.weight"
SCALES = PROJECTION + "_scale_inv"


def decoded_by_transformers(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> np.ndarray:
    """Return the bytes that transformers decodes to. Partial blocks are padded for it and cut off again."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8}
    codes = torch.frombuffer(bytearray(weight.data), dtype=torch.uint8).reshape(weight.shape)
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(codes, (0, -columns % block[1], 0, -rows % block[0]))
    scale_tensor = torch.frombuffer(bytearray(scale.data), dtype=dtypes[scale.dtype]).reshape(scale.shape)
    values = Fp8Dequantize(None)._dequantize_one(padded.view(torch.float8_e4m3fn), scale_tensor, torch.bfloat16)
    return values[..., :rows, :columns].contiguous().view(torch.uint8).flatten().numpy()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((256, 384), (128, 128)),
        ((130, 257), (128, 128)),
        ((1, 1), (128, 128)),
        ((7, 300), (2, 64)),
        ((3, 40, 50), (16, 32)),
    ],
)
def test_every_value_is_the_one_that_transformers_decodes(
    shape: tuple[int, ...], block: tuple[int, int], dtype: str, tmp_path: Path
) -> None:
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    weight, scale = fp8(shape), scales(grid, dtype)
    source = write_fp8(
        tmp_path / "source", {PROJECTION: weight, SCALES: scale}, {**FP8, "weight_block_size": list(block)}
    )
    opened = open_source(source)
    expected = decoded_by_transformers(weight, scale, block)
    for chunk_nbytes in (2, 254, 1 << 20) if len(expected) < 5000 else (4094, 1 << 20):
        assert np.array_equal(read(opened, PROJECTION, chunk_nbytes=chunk_nbytes), expected)
    opened.close()


@pytest.mark.parametrize("scale", [scales(()), scales((1,)), scales((1, 1), "BF16")])
def test_one_scale_for_a_whole_tensor(scale: Tensor, tmp_path: Path) -> None:
    weight = fp8((40, 50))
    source = write_fp8(tmp_path / "source", {PROJECTION: weight, SCALES: scale}, {**FP8, "weight_block_size": None})
    opened = open_source(source)
    expected = decoded_by_transformers(weight, Tensor(scale.dtype, (1, 1), scale.data), (1, 1))
    assert np.array_equal(read(opened, PROJECTION, chunk_nbytes=1000), expected)
    opened.close()


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_scales_that_are_powers_of_two(dtype: str, tmp_path: Path) -> None:
    weight = fp8((130, 40))
    scale = Tensor(dtype, (2, 1), bytes([115, 120]))
    source = write_fp8(tmp_path / "source", {PROJECTION: weight, SCALES: scale})
    opened = open_source(source)
    expected = decoded_by_transformers(weight, scale, (128, 128))
    assert np.array_equal(read(opened, PROJECTION, chunk_nbytes=1000), expected)
    opened.close()


def test_an_fp8_checkpoint_converts_to_the_bytes_of_its_bfloat16_twin(tmp_path: Path) -> None:
    weight, scale = fp8((48, 32)), scales((1, 1))
    activation = scales((1,))
    stored = {PROJECTION: weight, SCALES: scale, "model.layers.0.mlp.up_proj.activation_scale": activation}
    source = write_fp8(tmp_path / "source", stored)
    plain = Tensor("BF16", (48, 32), decoded_by_transformers(weight, scale, (128, 128)).tobytes())
    twin = write_checkpoint(tmp_path / "twin", {**llama_tensors(), PROJECTION: plain})
    convert(source, tmp_path / "out")
    convert(twin, tmp_path / "expected")
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    manifests = [json.loads(files.pop("qformat.json")) for files in (found, expected)]
    assert found == expected
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    assert manifests[0]["source"]["kind"] == "fp8"
    assert manifests[0]["source"]["container"] == "safetensors"
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    assert compare(tmp_path / "out", source).passed


def test_a_nan_among_the_codes_is_reported(tmp_path: Path) -> None:
    codes = bytearray(fp8((48, 32)).data)
    codes[70] = 0x7F
    source = write_fp8(
        tmp_path / "source", {PROJECTION: Tensor("F8_E4M3", (48, 32), bytes(codes)), SCALES: scales((1, 1))}
    )
    with pytest.raises(SourceError, match=r"the weight at \[2, 6\] is nan") as refused:
        convert(source, tmp_path / "out")
    assert refused.value.reason is Reason.NONFINITE_WEIGHT


@pytest.mark.parametrize(
    ("tensors", "quantization", "reason", "said"),
    [
        ({PROJECTION: fp8((48, 32))}, FP8, Reason.MISSING_COMPONENT, "has no scales"),
        ({PROJECTION: fp8((48, 32)), SCALES: scales((2, 1))}, FP8, Reason.COMPONENT_SHAPE, "[2, 1], expected [1, 1]"),
        ({PROJECTION: fp8((48, 32)), SCALES: fp8((1, 1))}, FP8, Reason.COMPONENT_DTYPE, "F8_E4M3"),
        ({}, FP8, Reason.CONFIG_FIELD, "no tensor is F8_E4M3"),
        ({PROJECTION: fp8((48, 32)), SCALES: scales((2, 1))}, {**FP8, "weight_block_size": None},
         Reason.COMPONENT_SHAPE, "one scale"),
        ({PROJECTION: fp8((48, 32)), SCALES: scales((1, 1))}, {**FP8, "weight_block_size": [128, 0]},
         Reason.CONFIG_FIELD, "expected two sizes"),
        ({PROJECTION: fp8((48, 32)), SCALES: scales((1, 1)), "model.lost.weight_scale_inv": scales((1, 1))}, FP8,
         Reason.ALREADY_QUANTIZED, "model.lost.weight_scale_inv"),
    ],
)  # fmt: skip
def test_inconsistent_tensors_are_rejected_with_a_reason(
    tensors: dict[str, Tensor], quantization: dict[str, object], reason: Reason, said: str, tmp_path: Path
) -> None:
    source = write_fp8(tmp_path / "source", tensors, quantization)
    with pytest.raises(SourceError) as refused:
        plan(source)
    assert refused.value.reason is reason
    assert said in str(refused.value)
    assert str(source) in str(refused.value)
