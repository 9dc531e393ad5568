"""Decoders of the 8- and 4-bit float blocks of published checkpoints to bfloat16: FP8 (E4M3) and MXFP4 (E2M1).

Each value is widened to float32, multiplied with the scale of its block in float32, and rounded once to bfloat16 (to
nearest, ties to even), as transformers does when it dequantizes such a checkpoint. The kernels are plain numba on flat
arrays and run without the GIL. Callers check the sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from qformat.codec.cpu.kernels import filled, kernel, taken
from qformat.codec.cpu.scalars import rounded_to_bf16
from qformat.codec.floats import FloatFormat, narrow

MXFP4_BLOCK = 32
"""Number of weights that share an exponent. Their codes take 16 bytes."""

_TILE_ROWS = 64


def _e4m3_values() -> NDArray[np.float32]:
    """Return the 256 values: a sign bit, 4 exponent bits with bias 7, 3 fraction bits. All ones is NaN."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(8 + fraction, exponent - 10))
    magnitude[code & 127 == 127] = np.nan
    values: NDArray[np.float32] = np.where(code < 128, magnitude, -magnitude).astype(np.float32)
    return values


def _e8m0_values() -> NDArray[np.float32]:
    """Return the 256 powers of two. Code 255 is infinity, as in transformers."""
    with np.errstate(over="ignore"):
        powers: NDArray[np.float32] = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    return powers


def _mxfp4_values() -> NDArray[np.uint16]:
    """Return the bfloat16 bits of each code with each exponent, at 16 * exponent + code. Exact except for overflow."""
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        products = E8M0[:, None] * np.concatenate([positive, -positive])
    return narrow(products.ravel(), FloatFormat.BF16).astype(np.uint16)


E4M3 = _e4m3_values()
E8M0 = _e8m0_values()
_MXFP4_BF16 = _mxfp4_values()


@kernel(
    types.void(
        taken(types.uint8),
        types.int64,
        types.int64,
        types.int64,
        types.int64,
        types.int64,
        taken(types.float32),
        filled(types.uint16),
    )
)
def decode_e4m3(
    codes: Any, first: Any, n_rows: Any, n_columns: Any, block_rows: Any, block_columns: Any, scales: Any, out: Any
) -> Any:
    """Decode consecutive elements of FP8 matrices [..., n_rows, n_columns].

    A block has many more elements than there are codes, so the value of each code is computed once per block.

    Args:
        codes: E4M3 codes, uint8 [n].
        first: Index of the first element in the flat matrices.
        n_rows: Number of rows of a matrix.
        n_columns: Number of columns of a matrix.
        block_rows: Number of rows of a block.
        block_columns: Number of columns of a block.
        scales: Scales of the blocks, flat float32 [..., ceil(n_rows / block_rows), ceil(n_columns / block_columns)].
        out: Array for the bfloat16 bits, uint16 [n].
    """
    grid_rows = (n_rows + block_rows - 1) // block_rows
    grid_columns = (n_columns + block_columns - 1) // block_columns
    table = np.empty(grid_columns * 256, np.uint16)
    in_table = -1
    done = 0
    while done < codes.size:
        row, column = divmod(first + done, n_columns)
        matrix, row = divmod(row, n_rows)
        row_of_blocks = matrix * grid_rows + row // block_rows
        if row_of_blocks != in_table:
            for block in range(grid_columns):
                scale = scales[row_of_blocks * grid_columns + block]
                for code in range(256):
                    table[block * 256 + code] = rounded_to_bf16(E4M3[code] * scale)
            in_table = row_of_blocks
        block = column // block_columns
        length = min(min(n_columns, (block + 1) * block_columns) - column, codes.size - done)
        for j in range(done, done + length):
            out[j] = table[block * 256 + codes[j]]
        done += length


@kernel(
    types.void(
        taken(types.uint8), taken(types.uint8), types.int64, types.int64, types.int64, types.int64, filled(types.uint16)
    )
)
def decode_mxfp4_transposed(
    blocks: Any, exponents: Any, n_rows: Any, n_groups: Any, start: Any, stop: Any, out: Any
) -> Any:
    """Decode columns of an MXFP4 matrix [n_rows, n_groups * 32] into rows of its transpose.

    One block of each of 64 rows is decoded into a tile of 4 KiB. The rows of the tile are then written, so that every
    write to the transpose fills a cache line.

    Args:
        blocks: Packed codes, flat uint8 [n_rows, n_groups, 16], the first of a pair in the low nibble.
        exponents: Exponents with bias 127, flat uint8 [n_rows, n_groups].
        n_rows: Number of rows of the matrix.
        n_groups: Number of blocks per row.
        start: Index of the first column.
        stop: Index after the last column.
        out: Array for the bfloat16 bits, flat uint16 [stop - start, n_rows].
    """
    tile = np.empty((MXFP4_BLOCK, _TILE_ROWS), np.uint16)
    for first_row in range(0, n_rows, _TILE_ROWS):
        n_tile = min(_TILE_ROWS, n_rows - first_row)
        for group in range(start // MXFP4_BLOCK, (stop + MXFP4_BLOCK - 1) // MXFP4_BLOCK):
            for row in range(n_tile):
                at = (first_row + row) * n_groups + group
                exponent = np.int64(exponents[at]) * 16
                for byte in range(MXFP4_BLOCK // 2):
                    pair = np.int64(blocks[at * 16 + byte])
                    tile[2 * byte, row] = _MXFP4_BF16[exponent + (pair & 15)]
                    tile[2 * byte + 1, row] = _MXFP4_BF16[exponent + (pair >> 4)]
            for column in range(max(start, group * MXFP4_BLOCK), min(stop, (group + 1) * MXFP4_BLOCK)):
                place = (column - start) * n_rows + first_row
                for row in range(n_tile):
                    out[place + row] = tile[column % MXFP4_BLOCK, row]
