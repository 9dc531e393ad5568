"""Weights, codes and scales for tests, and memory that reveals writes outside of an array."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from numpy.typing import NDArray

from qformat.codec import nested, nf4
from qformat.codec.cpu import lanes
from qformat.codec.cpu.blocks import Instructions
from qformat.codec.floats import FloatFormat, Raw, narrow
from qformat.codec.nested import NESTED_BLOCK_SIZE

STEADY = settings(deadline=None)  # the first example may compile, and test machines stall
FORMATS = list(FloatFormat)
RUNNABLE: list[Instructions] = [
    *(name for name, needed in lanes.NEEDED_FEATURES.items() if needed <= lanes.cpu_features()),
    "plain",
]
GUARD = 0xA5


def sizes_around(block_size: int) -> list[int]:
    return sorted({0, 1, 2, 31, 37, 63, 65, block_size - 1, block_size, block_size + 1, 3 * block_size, 1009, 1024})


def weights(n: int, float_format: FloatFormat, *, seed: int = 0) -> Raw:
    """Return n raw weights that include blocks of zeros, negative zeros and subnormals."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(n, np.float32) * np.float32(0.02)
    values[generator.random(n) < 0.05] = -0.0
    values[generator.random(n) < 0.05] = 1e-41
    values[(np.arange(n) // 32 % 7) == 2] = 0
    return narrow(values, float_format)


class Guarded:
    """Return an unaligned array between guard bytes that must not change."""

    def __init__(self, size: int, dtype: np.dtype[np.generic] | type) -> None:
        nbytes = size * np.dtype(dtype).itemsize
        self._memory = np.full(65 + nbytes + 64, GUARD, np.uint8)
        self._nbytes = nbytes
        self.array = self._memory[65 : 65 + nbytes].view(dtype)

    def tobytes(self) -> bytes:
        assert (self._memory[:65] == GUARD).all()
        assert (self._memory[65 + self._nbytes :] == GUARD).all()
        return self.array.tobytes()


def as_mapped(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return a read-only, unaligned copy, as a view of a mapped file may be."""
    copy = Guarded(array.size, array.dtype).array
    copy[:] = array
    copy.setflags(write=False)
    return copy


def double_quantized(n: int, block_size: int, *, seed: int = 0) -> tuple[NDArray[np.uint8], nested.NestedAbsmax]:
    """Return random packed codes and a second level that includes negative scales."""
    generator = np.random.default_rng(seed)
    packed = generator.integers(0, 256, nf4.packed_nbytes(n), dtype=np.uint8)
    n_blocks = nf4.block_count(n, block_size)
    codes = generator.integers(0, 256, n_blocks, dtype=np.uint8)
    scales = generator.random(nf4.block_count(n_blocks, NESTED_BLOCK_SIZE), np.float32) * np.float32(0.3)
    return packed, nested.NestedAbsmax(codes, scales, np.float32(0.0831))


def decoded_by_reference(
    packed: NDArray[np.uint8], second: nested.NestedAbsmax, n: int, block_size: int, float_format: FloatFormat
) -> Raw:
    absmax = nested.decode_absmax(second.codes, second.nested_absmax, second.offset)
    return narrow(nf4.decode(packed, absmax, n_elements=n, block_size=block_size), float_format)
