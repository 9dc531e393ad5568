"""Dot products of each block of values with the codebook values of its codes: the gradients of the scales.

A weight is codebook[code] * scale. The gradient of a scale is therefore the sum, over its block, of the gradient of
each weight times codebook[code]. The fast decoder decodes the codes with scales of 1, in parts that fit the cache. Sums
are float32, in an order that depends only on the CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from qformat.codec import nf4
from qformat.codec.cpu.blocks import decode_into
from qformat.codec.cpu.kernels import Kernel, filled, format_literal, jit, raw_type, taken
from qformat.codec.cpu.scalars import widened
from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.errors import UsageError

TILE = 1 << 15
"""Number of weights to decode at a time: 128 KiB of float32 fit the L2 cache. A multiple of every block size."""


def block_dots_into(
    values: Raw,
    float_format: FloatFormat,
    packed: NDArray[np.uint8],
    *,
    block_size: int,
    out: NDArray[np.float32],
) -> None:
    """Compute the dot product of each block of values with the codebook values of its codes.

    Args:
        values: Raw elements [n].
        float_format: Float format of the values, bfloat16 or float32.
        packed: Packed codes, uint8 [ceil(n / 2)].
        block_size: Number of elements per block.
        out: Array for the dot products, float32 [ceil(n / block_size)].

    Raises:
        UsageError: The dtypes or sizes of the arrays do not match.
    """
    _require("values", values, float_format.raw_dtype, values.size)
    _require("packed", packed, np.uint8, packed_nbytes(values.size))
    _require("out", out, np.float32, block_count(values.size, block_size))
    kernel = _KERNELS[float_format]
    whole = values.size // block_size * block_size
    factors = np.empty(min(TILE, whole), np.float32)
    for start in range(0, whole, TILE):
        stop = min(start + TILE, whole)
        decoded = factors[: stop - start]
        blocks = slice(start // block_size, stop // block_size)
        decode_into(
            packed[start // 2 : stop // 2],
            _ones(TILE // min(nf4.BLOCK_SIZES))[: blocks.stop - blocks.start],
            n_elements=stop - start,
            block_size=block_size,
            float_format=FloatFormat.F32,
            out=decoded,
        )
        kernel(values[start:stop], decoded, block_size, out[blocks])
    if whole < values.size:
        rest = values.size - whole
        decoded = nf4.decode(packed[whole // 2 :], np.ones(1, np.float32), n_elements=rest, block_size=block_size)
        out[-1] = widen(values[whole:], float_format) @ decoded


@cache
def _ones(n: int) -> NDArray[np.float32]:
    return np.ones(n, np.float32)


def _require(name: str, array: NDArray[Any], dtype: type | np.dtype[np.generic], size: int) -> None:
    if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
        raise UsageError(
            f"{name}: found {array.dtype} of shape {list(array.shape)}, expected contiguous {np.dtype(dtype)} [{size}]"
        )


# Each block is a slice. With indices into the entire array, numba keeps a branch for negative indices and LLVM does not
# vectorise the loop (450 instead of 12,000 M weights/s on one thread with AVX-512).
def _block_dots(values: Any, factors: Any, block_size: Any, out: Any, float_format: Any) -> None:
    for block in range(out.size):
        theirs = values[block * block_size : (block + 1) * block_size]
        mine = factors[block * block_size : (block + 1) * block_size]
        total = np.float32(0)
        for j in range(theirs.size):
            total += widened(theirs[j], float_format) * mine[j]
        out[block] = total


_DISPATCHER = jit(_block_dots, any_order=True)


def _kernel(float_format: FloatFormat) -> Kernel:
    """Return the kernel (values [n], factors [n], block_size, out [n / block_size])."""
    arrays = taken(raw_type(float_format)), taken(types.float32)
    name = format_literal(float_format)
    return Kernel(_DISPATCHER, types.void(*arrays, types.int64, filled(types.float32), name))


_KERNELS = {each: _kernel(each) for each in (FloatFormat.BF16, FloatFormat.F32)}
