"""The dequantization kernel in Triton's interpreter is bit-identical to the reference (run by test_dequantize)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.kernels.guarded import guarded_weight
from tests.kernels.triton.interpreter import patch
from tools.gpu.weights import bits, random_weight, reference_bits

patch()

from qformat.codec.nf4 import BLOCK_SIZES  # noqa: E402
from qformat.kernels.packed_weight import PackedWeight  # noqa: E402
from qformat.kernels.triton.dequantize import TILE, dequantize  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def mismatches(weight: PackedWeight, dtype: torch.dtype) -> int:
    out = torch.full(weight.shape, 77.0, dtype=dtype)
    dequantize(weight, out)
    return int((bits(out) != reference_bits(weight, dtype)).sum())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tiles_equal_the_reference(dtype: torch.dtype, block_size: int, double_quant: bool) -> None:
    weight = random_weight((64, 9 * TILE // 64), block_size=block_size, double_quant=double_quant)
    assert mismatches(weight, dtype) == 0


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_last_partial_tile_of_an_odd_weight_equals_the_reference(
    dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    weight = random_weight((103, 241), block_size=block_size, double_quant=double_quant)  # two primes, 3 tiles + 247
    assert mismatches(weight, dtype) == 0


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 2), (1, 7), (3, 5), (1, 63), (1, 64), (1, 65), (127, 1), (1, TILE - 1), (1, TILE), (1, TILE + 1),
     (1, 2 * TILE - 7), (576, 64)],
)  # fmt: skip
def test_every_tail_equals_the_reference(shape: tuple[int, int]) -> None:
    assert mismatches(random_weight(shape), torch.bfloat16) == 0


def test_nothing_is_launched_for_an_empty_weight() -> None:
    assert mismatches(random_weight((0, 64)), torch.bfloat16) == 0


def test_more_than_one_nested_block_equals_the_reference() -> None:
    weight = random_weight((33, 4 * TILE // 32), block_size=32)
    assert weight.nested_absmax is not None
    assert weight.nested_absmax.numel() > 4
    assert mismatches(weight, torch.bfloat16) == 0


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_codes_at_any_address_equal_the_reference(offset: int) -> None:
    weight = random_weight((2, TILE))
    moved = torch.zeros(weight.packed.numel() + offset, dtype=torch.uint8)
    moved[offset:] = weight.packed
    weight = dataclasses.replace(weight, packed=moved[offset:])
    assert weight.packed.data_ptr() % 16 != 0
    assert mismatches(weight, torch.bfloat16) == 0


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("n", [32, 33, TILE, TILE + 64, 2 * TILE + 5])
def test_nothing_is_read_or_written_past_the_end(n: int, double_quant: bool) -> None:
    weight = guarded_weight(random_weight((1, n), double_quant=double_quant))
    arena = torch.full((n + 64,), 77.0, dtype=torch.bfloat16)
    dequantize(weight, arena[:n].view(1, n))
    assert bool((arena[n:] == 77.0).all())


def test_scales_that_overflow_half_precision_round_like_the_reference() -> None:
    weight = random_weight((8, TILE), double_quant=False)
    weight.absmax.mul_(1e5)
    weight.absmax[1::5] = 1e-7  # subnormal halves
    with np.errstate(over="ignore"):
        assert mismatches(weight, torch.float16) == 0
