"""Dot products of blocks on the CPU agree with float64 for every block size, format and tail."""

from __future__ import annotations

import numpy as np
import pytest

from qformat.codec import nf4
from qformat.codec.cpu.block_dots import TILE, block_dots_into
from qformat.codec.floats import FloatFormat, narrow, widen
from qformat.errors import UsageError


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("float_format", [FloatFormat.BF16, FloatFormat.F32])
@pytest.mark.parametrize("n", [0, 1, 31, 64, 257, TILE, TILE + 33, 3 * TILE + 64])
def test_every_block_has_its_dot_product(n: int, float_format: FloatFormat, block_size: int) -> None:
    generator = np.random.default_rng(n)
    raw = narrow(generator.standard_normal(n).astype(np.float32), float_format)
    packed = generator.integers(0, 256, nf4.packed_nbytes(n), dtype=np.uint8)
    out = np.full(nf4.block_count(n, block_size), np.nan, np.float32)
    block_dots_into(raw, float_format, packed, block_size=block_size, out=out)
    ones = np.ones(out.size, np.float32)
    products = np.zeros(out.size * block_size)
    products[:n] = widen(raw, float_format) * nf4.decode(packed, ones, n_elements=n, block_size=block_size).astype(
        float
    )
    blocks = products.reshape(-1, block_size)
    assert (np.abs(out - blocks.sum(1)) <= np.abs(blocks).sum(1) * block_size * 2.0**-24).all()


def test_read_only_values_of_a_mapped_file_are_accepted() -> None:
    values, packed, out = np.ones(64, np.float32), np.zeros(32, np.uint8), np.empty(1, np.float32)
    values.flags.writeable = packed.flags.writeable = False
    block_dots_into(values, FloatFormat.F32, packed, block_size=64, out=out)
    assert out[0] == -64


@pytest.mark.parametrize(
    ("values", "packed", "out", "message"),
    [
        (np.ones(64), np.zeros(32, np.uint8), np.zeros(1, np.float32), "values: found float64"),
        (np.ones(64, np.float32), np.zeros(31, np.uint8), np.zeros(1, np.float32), "packed: found uint8"),
        (np.ones(65, np.float32), np.zeros(33, np.uint8), np.zeros(1, np.float32), r"out: found float32 .*\[2\]"),
    ],
)
def test_arrays_of_the_wrong_size_or_dtype_are_rejected(
    values: np.ndarray, packed: np.ndarray, out: np.ndarray, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        block_dots_into(values, FloatFormat.F32, packed, block_size=64, out=out)
