"""The kernel that sums over blocks, in Triton's interpreter, against float64 (run by test_block_dots)."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.guarded import guarded
from tests.kernels.triton.interpreter import patch
from tools.gpu.weights import exact_block_dots, random_codes

patch()

from qformat.codec.nf4 import BLOCK_SIZES, block_count  # noqa: E402
from qformat.kernels.triton.block_dots import TILE, block_dots  # noqa: E402


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [1, 257, TILE, TILE + 517])
def test_every_sum_is_correct_and_nothing_past_the_end_is_written(n: int, dtype: torch.dtype, block_size: int) -> None:
    values = guarded(torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype))
    if values.data_ptr() % 16:
        values = values.clone()
    packed = guarded(random_codes(n))
    arena = torch.full((block_count(n, block_size) + 8,), 77.0)
    out = arena[: block_count(n, block_size)]
    block_dots(values, packed, block_size, out)
    exact, magnitude = exact_block_dots(values, packed, block_size)
    assert ((out.double() - exact).abs() <= magnitude * block_size * 2.0**-24).all()
    assert (arena[out.numel() :] == 77.0).all()


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_codes_at_any_address_give_the_same_sums(offset: int) -> None:
    n = TILE + 64
    values, packed = torch.randn(n), random_codes(n)
    moved = torch.zeros(packed.numel() + offset, dtype=torch.uint8)
    moved[offset:] = packed
    out = torch.empty(n // 64)
    block_dots(values, moved[offset:], 64, out)
    exact, magnitude = exact_block_dots(values, packed, 64)
    assert ((out.double() - exact).abs() <= magnitude * 64 * 2.0**-24).all()


def test_nothing_is_launched_without_values() -> None:
    nothing = torch.empty(0)
    block_dots(nothing, torch.empty(0, dtype=torch.uint8), 64, nothing)
