"""numba kernels of error feedback: scales and codes of one column of blocks, for a range of rows.

    weights [n, k]         one column of blocks (block_size columns), a tile of 64 rows at a time
    +----+----+----+
    |    |tile|    |       choose_scales: scale of each row's block
    |    +----+    |       round_block:   codes, and the error that later columns compensate for
    |    |    |    |
    +----+----+----+

Tiles of rows are transposed into scratch memory, so that every inner loop runs over rows. Rows are independent, so LLVM
vectorises these loops, and neither the number of threads nor the tile size changes any bit. fastmath stays off.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from qformat.codec.codebooks import NF4_CODEBOOK
from qformat.codec.cpu.kernels import kernel
from qformat.codec.cpu.scalars import nearest_code
from qformat.codec.nf4 import SMALLEST_DIVISOR

TILE = 64
"""Number of rows per tile. A tile of 64 columns takes 16 KiB, half of a first-level cache."""

_inline = numba.njit(inline="always")

_MATRIX = types.Array(types.float32, 2, "C", aligned=False)
_READ_MATRIX = types.Array(types.float32, 2, "C", readonly=True, aligned=False)
_READ_VECTOR = types.Array(types.float32, 1, "C", readonly=True, aligned=False)
_CODES = types.Array(types.uint8, 2, "C", aligned=False)


@_inline
def _divisor(scale: Any) -> Any:
    """Return a divisor for a scale. Decoded scales may be zero or negative."""
    if scale < 0:
        return min(scale, -SMALLEST_DIVISOR)
    return max(scale, SMALLEST_DIVISOR)


@kernel(
    types.void(_READ_MATRIX, types.int64, types.int64, types.int64, types.int64, _READ_VECTOR, _READ_VECTOR, _MATRIX)
)
def choose_scales(
    weights: Any, first_row: Any, last_row: Any, start: Any, block_size: Any, precisions: Any, factors: Any, scales: Any
) -> None:
    """Choose the scales of the blocks at column `start` for rows [first_row, last_row).

    A scale is the product of the block's absmax and the factor with the smallest weighted error, the first one if there
    are several.

    Args:
        weights: Weights with feedback applied, float32 [n, k].
        first_row: First row.
        last_row: Row after the last one.
        start: First column of the blocks.
        block_size: Number of columns per block.
        precisions: Weight of a squared error in each column, float32 [k].
        factors: Candidate factors, float32 [f].
        scales: Scales to fill in, float32 [n, k / block_size]; column start / block_size is written.
    """
    block = start // block_size
    tile = np.empty((block_size, TILE), np.float32)
    largest, best, chosen = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    error, scale, reciprocal = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for row in range(first_row, last_row, TILE):
        n = min(TILE, last_row - row)
        largest[:] = 0
        best[:] = np.inf
        for r in range(n):
            for j in range(block_size):
                tile[j, r] = weights[row + r, start + j]
        for j in range(block_size):
            for r in range(n):
                largest[r] = max(largest[r], abs(tile[j, r]))
        for factor in factors:
            for r in range(n):
                scale[r] = largest[r] * factor
                reciprocal[r] = np.float32(1) / _divisor(scale[r])
                error[r] = 0
            for j in range(block_size):
                precision = precisions[start + j]
                for r in range(n):
                    off = NF4_CODEBOOK[nearest_code(tile[j, r] * reciprocal[r])] * scale[r] - tile[j, r]
                    error[r] += off * off * precision
            for r in range(n):
                if error[r] < best[r]:
                    best[r] = error[r]
                    chosen[r] = scale[r]
        for r in range(n):
            scales[row + r, block] = chosen[r] if largest[r] > 0 else np.float32(0)


@kernel(
    types.void(
        _READ_MATRIX, types.int64, types.int64, types.int64, types.int64, _READ_MATRIX, _READ_MATRIX, _CODES, _MATRIX
    )
)
def round_block(
    weights: Any,
    first_row: Any,
    last_row: Any,
    start: Any,
    block_size: Any,
    factor: Any,
    scales: Any,
    codes: Any,
    errors: Any,
) -> None:
    """Round the blocks at column `start` column by column and pass each column's error on to the later ones.

    Args:
        weights: Weights with feedback applied, float32 [n, k].
        first_row: First row.
        last_row: Row after the last one.
        start: First column of the blocks.
        block_size: Number of columns per block.
        factor: Upper factor U of the inverse Hessian, float32 [k, k].
        scales: Scales, float32 [n, k / block_size].
        codes: Codes to fill in, uint8 [n, k]; the columns of these blocks are written.
        errors: Filled with (weight - rounded) / U[j, j] of each column, float32 [n, block_size], for adjusting the
            columns after these blocks.
    """
    block = start // block_size
    tile = np.empty((block_size, TILE), np.float32)
    scale, reciprocal, error = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    found = np.empty(TILE, np.int32)
    for row in range(first_row, last_row, TILE):
        n = min(TILE, last_row - row)
        for r in range(n):
            scale[r] = scales[row + r, block]
            reciprocal[r] = np.float32(1) / _divisor(scale[r])
            for j in range(block_size):
                tile[j, r] = weights[row + r, start + j]
        for j in range(block_size):
            share = np.float32(1) / factor[start + j, start + j]
            for r in range(n):
                found[r] = nearest_code(tile[j, r] * reciprocal[r])
                error[r] = (tile[j, r] - NF4_CODEBOOK[found[r]] * scale[r]) * share
            for later in range(j + 1, block_size):
                move = factor[start + j, start + later]
                for r in range(n):
                    tile[later, r] -= error[r] * move
            for r in range(n):
                codes[row + r, start + j] = found[r]
                errors[row + r, j] = error[r]
