"""The product kernel in Triton's interpreter, with its PTX evaluated (run by test_product)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.kernels.guarded import guarded, guarded_weight
from tests.kernels.triton.interpreter import patch
from tools.gpu.weights import random_weight, reference_bits

patch()

from qformat.codec.floats import FloatFormat, widen  # noqa: E402
from qformat.codec.nf4 import BLOCK_SIZES  # noqa: E402
from qformat.kernels.packed_weight import PackedWeight  # noqa: E402
from qformat.kernels.triton.product import LaunchPlan, plan, product, product_as_planned  # noqa: E402

FORMATS = {torch.bfloat16: FloatFormat.BF16, torch.float16: FloatFormat.F16}


def reference_values(weight: PackedWeight, dtype: torch.dtype) -> np.ndarray:
    return widen(reference_bits(weight, dtype), FORMATS[dtype])


def wrong_weights(weight: PackedWeight, dtype: torch.dtype, **options: int) -> int:
    """Read every weight out of the product with unit vectors, 16 columns at a time, and return the number of errors.

    A sum of one weight and zeros is exact, so the product must equal the weight, except that -0 becomes 0.
    """
    n, k = weight.shape
    found = torch.full((k, n), 77.0, dtype=torch.float32)
    unit = torch.eye(k, dtype=dtype)
    for first in range(0, k, 16):
        chosen = plan(16, weight.shape, n_multiprocessors=1)
        if options:
            chosen = LaunchPlan(chosen.batch, options.get("rows", chosen.rows), options.get("splits", 1))
        product_as_planned(unit[first : first + 16], weight, found[first : first + 16], chosen)
    return int((reference_values(weight, dtype) != found.numpy().T).sum())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_weight_is_the_reference_weight(dtype: torch.dtype, block_size: int, double_quant: bool) -> None:
    weight = random_weight((64, 320), block_size=block_size, double_quant=double_quant)  # a step and a segment
    assert wrong_weights(weight, dtype) == 0


@pytest.mark.parametrize("shape", [(1, 64), (7, 128), (63, 192), (65, 256), (100, 448)])
def test_every_tail_of_rows_and_columns_is_correct(shape: tuple[int, int]) -> None:
    assert wrong_weights(random_weight(shape), torch.bfloat16) == 0


@pytest.mark.parametrize(("k", "splits"), [(512, 2), (576, 2), (576, 3)])
def test_every_split_of_the_columns_is_correct(k: int, splits: int) -> None:
    """With three splits of two steps, the last split has only the tail."""
    assert wrong_weights(random_weight((32, k)), torch.bfloat16, rows=32, splits=splits) == 0


@pytest.mark.parametrize("m", [1, 2, 5, 8, 9, 16])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_product_equals_the_sum_in_float64(dtype: torch.dtype, m: int) -> None:
    """The bound: k additions in float32, each with an error of at most 2^-24 of the sum of magnitudes."""
    weight = random_weight((130, 960))
    x = torch.randn(m, 960, generator=torch.Generator().manual_seed(m)).to(dtype)
    out = torch.full((m, 130), 77.0, dtype=torch.float32)
    product(x, weight, out)
    values = reference_values(weight, dtype).astype(np.float64)
    exact = x.double().numpy() @ values.T
    magnitude = np.abs(x.double().numpy()) @ np.abs(values).T
    assert (np.abs(out.numpy() - exact) <= magnitude * 960 * 2.0**-24).all()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_output_is_the_float32_sum_rounded_once(dtype: torch.dtype, splits: int) -> None:
    weight = random_weight((48, 512))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.empty((3, 48), dtype=torch.float32)
    narrow = torch.empty((3, 48), dtype=dtype)
    chosen = LaunchPlan(8, 32, splits)
    product_as_planned(x, weight, wide, chosen)
    product_as_planned(x, weight, narrow, chosen)
    assert torch.equal(wide.to(dtype), narrow)


@pytest.mark.parametrize("block_size", [32, 256])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("m", "shape"), [(1, (31, 64)), (5, (33, 448)), (16, (65, 512))])
def test_nothing_is_read_past_the_end(m: int, shape: tuple[int, int], double_quant: bool, block_size: int) -> None:
    weight = guarded_weight(random_weight(shape, double_quant=double_quant, block_size=block_size))
    x = guarded(torch.ones(m, shape[1], dtype=torch.bfloat16))
    product(x, weight, guarded(torch.empty(m, shape[0])))


def test_rows_past_m_are_not_written() -> None:
    weight = random_weight((40, 256))
    arena = torch.full((6, 40), 77.0, dtype=torch.float32)
    product(torch.ones(3, 256, dtype=torch.bfloat16), weight, arena[:3])
    assert bool((arena[3:] == 77.0).all())
    assert bool((arena[:3] != 77.0).all())


@pytest.mark.parametrize(("m", "shape"), [(0, (32, 64)), (2, (0, 64))])
def test_nothing_is_launched_for_an_empty_product(m: int, shape: tuple[int, int]) -> None:
    product(torch.empty(m, shape[1], dtype=torch.bfloat16), random_weight(shape), torch.empty(m, shape[0]))


def test_no_columns_give_zeros() -> None:
    out = torch.full((2, 32), math.nan)
    product(torch.empty(2, 0, dtype=torch.bfloat16), random_weight((32, 0)), out)
    assert torch.equal(out, torch.zeros(2, 32))
