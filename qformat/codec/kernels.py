"""numba kernels of the encoder: bit for bit the reference of `nf4` and `nested`, on plain arrays, without the GIL.

They check nothing: shapes and sizes are the business of `qformat.codec.cpu`, their only caller. fastmath stays off:
reassociation or a fused multiply-add would change bits.
"""

from __future__ import annotations

import numba
import numpy as np

from qformat.codec.codebooks import DYNAMIC_THRESHOLDS, NF4_THRESHOLDS
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import SMALLEST_DIVISOR

jit = numba.njit(nogil=True, cache=True, error_model="numpy")
inline = numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")

TILE = 4096
"""Elements widened at a time: 16 KiB of float32 stay in the L1 cache. A multiple of every block size."""
MAX_BLOCKS_PER_TILE = TILE // 32

F16_INFINITY = np.uint32(0x47800000)
"""float32 bits of 65536: what float16 infinities and NaNs widen to, or to more."""
F32_INFINITY = np.uint32(0x7F800000)
F16_TO_F32_SCALE = np.float32(2.0**112)
"""float16 bits moved to float32's place, times this, is the value: it corrects the exponent's bias, subnormals included."""

(_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9, _T10, _T11, _T12, _T13, _T14) = NF4_THRESHOLDS


@inline
def _code(value):
    """Count the thresholds below a scaled weight; LLVM turns the sum of comparisons into vector masks."""
    return (
        np.int32(value > _T0)
        + np.int32(value > _T1)
        + np.int32(value > _T2)
        + np.int32(value > _T3)
        + np.int32(value > _T4)
        + np.int32(value > _T5)
        + np.int32(value > _T6)
        + np.int32(value > _T7)
        + np.int32(value > _T8)
        + np.int32(value > _T9)
        + np.int32(value > _T10)
        + np.int32(value > _T11)
        + np.int32(value > _T12)
        + np.int32(value > _T13)
        + np.int32(value > _T14)
    )


@inline
def _encode_tile(values, n, block_size, infinity, codes, packed, absmax):
    """Encode float32 values[:n] that begin at a block; return whether all are finite.

    values float32 [TILE]; codes uint8 [TILE] scratch; packed uint8 [ceil(n/2)] and absmax float32 [blocks] out.
    """
    bits = values.view(np.uint32)
    absmax_bits = absmax.view(np.uint32)
    finite = True
    block = 0
    for start in range(0, n, block_size):
        size = min(block_size, n - start)
        largest = np.uint32(0)
        for i in range(size):
            largest = max(largest, bits[start + i] & np.uint32(0x7FFFFFFF))
        finite = finite and largest < infinity
        absmax_bits[block] = largest
        divisor = max(absmax[block], SMALLEST_DIVISOR)
        block += 1
        if size == block_size:
            reciprocal = np.float32(1) / divisor
            for i in range(block_size):
                codes[start + i] = np.uint8(_code(values[start + i] * reciprocal))
        else:
            for i in range(size):
                codes[start + i] = np.uint8(_code(values[start + i] / divisor))
    if n % 2:
        codes[n] = np.uint8(7)
    for i in range((n + 1) // 2):
        packed[i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]
    return finite


@jit
def encode_bf16(raw, block_size, packed, absmax):
    """Encode bfloat16 bits uint16 [n] into packed uint8 [ceil(n/2)] and absmax float32 [blocks]; True if all finite."""
    values = np.empty(TILE, np.float32)
    bits = values.view(np.uint32)
    codes = np.empty(TILE + 1, np.uint8)
    finite = True
    for start in range(0, raw.size, TILE):
        n = min(TILE, raw.size - start)
        for i in range(n):
            bits[i] = np.uint32(raw[start + i]) << np.uint32(16)
        tile_packed = packed[start // 2 :]
        tile_absmax = absmax[start // block_size :]
        finite &= _encode_tile(values, n, block_size, F32_INFINITY, codes, tile_packed, tile_absmax)
    return finite


@jit
def encode_f16(raw, block_size, packed, absmax):
    """Encode float16 bits uint16 [n]; outputs as `encode_bf16`."""
    values = np.empty(TILE, np.float32)
    bits = values.view(np.uint32)
    codes = np.empty(TILE + 1, np.uint8)
    finite = True
    for start in range(0, raw.size, TILE):
        n = min(TILE, raw.size - start)
        for i in range(n):
            half = np.uint32(raw[start + i])
            bits[i] = ((half & np.uint32(0x8000)) << np.uint32(16)) | ((half & np.uint32(0x7FFF)) << np.uint32(13))
        for i in range(n):
            values[i] = values[i] * F16_TO_F32_SCALE
        tile_packed = packed[start // 2 :]
        tile_absmax = absmax[start // block_size :]
        finite &= _encode_tile(values, n, block_size, F16_INFINITY, codes, tile_packed, tile_absmax)
    return finite


@jit
def encode_f32(raw, block_size, packed, absmax):
    """Encode float32 [n]; outputs as `encode_bf16`."""
    codes = np.empty(TILE + 1, np.uint8)
    finite = True
    for start in range(0, raw.size, TILE):
        n = min(TILE, raw.size - start)
        tile_packed = packed[start // 2 :]
        tile_absmax = absmax[start // block_size :]
        finite &= _encode_tile(raw[start:], n, block_size, F32_INFINITY, codes, tile_packed, tile_absmax)
    return finite


@jit
def add_in_order(values, total):
    """Return the float64 `total` plus float32 values [n], added one after another in index order."""
    for i in range(values.size):
        total += np.float64(values[i])
    return total


@jit
def encode_absmax(absmax, offset, codes, nested_absmax):
    """Encode absmax float32 [n] into codes uint8 [n] and nested_absmax float32 [ceil(n/256)]."""
    scaled = np.empty(NESTED_BLOCK_SIZE, np.float32)
    for group in range(nested_absmax.size):
        start = group * NESTED_BLOCK_SIZE
        size = min(NESTED_BLOCK_SIZE, absmax.size - start)
        largest = np.float32(0)
        for i in range(size):
            scaled[i] = absmax[start + i] - offset
            largest = max(largest, abs(scaled[i]))
        nested_absmax[group] = largest
        if largest == 0:
            codes[start : start + size] = 0
            continue
        for i in range(size):
            value = scaled[i] / largest
            # Branchless binary search for the number of thresholds below the value: 8 halvings of 256.
            low = 0
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                low += step * np.int64(DYNAMIC_THRESHOLDS[low + step - 1] < value)
            codes[start + i] = np.uint8(low)
