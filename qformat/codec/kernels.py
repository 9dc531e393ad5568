"""numba kernels of the codec: bit for bit the reference of `nf4` and `nested`, on plain arrays, without the GIL.

They check nothing: shapes and sizes are the business of `qformat.codec.cpu`, their only caller. fastmath stays off:
reassociation or a fused multiply-add would change bits. Each loop does one simple thing on a few hundred bytes, so
that LLVM vectorizes it; slices and helper arrays that might alias keep it from doing so (1,500 against 320 million
weights a second and thread, measured on AVX-512).
"""

from __future__ import annotations

import numba
import numpy as np

from qformat.codec.codebooks import DYNAMIC_THRESHOLDS, NF4_CODEBOOK, NF4_THRESHOLDS
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import BLOCK_SIZES, SMALLEST_DIVISOR

jit = numba.njit(nogil=True, cache=True, error_model="numpy")
inline = numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")

LARGEST_BLOCK = max(BLOCK_SIZES)
BF16_INFINITY = np.uint16(0x7F80)
F16_INFINITY = np.uint16(0x7C00)
F32_INFINITY = np.uint32(0x7F800000)
F16_SCALE = np.float32(2.0**112)
"""float16 bits moved to float32's place, times this, are the value: it corrects the exponent, subnormals included."""

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
def _encode_tail(values, size, codes, packed, first, absmax):
    """Encode a last partial block of float32 values [size], which divides where whole blocks multiply."""
    largest = np.float32(0)
    for i in range(size):
        largest = max(largest, abs(values[i]))
    absmax[absmax.size - 1] = largest
    divisor = max(largest, SMALLEST_DIVISOR)
    for i in range(size):
        codes[i] = np.uint8(_code(values[i] / divisor))
    codes[size] = np.uint8(7)  # the partner of an odd last code
    for i in range((size + 1) // 2):
        packed[first + i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]


@jit
def encode_bf16(raw, block_size, packed, absmax):
    """Encode bfloat16 bits uint16 [n] into packed uint8 [ceil(n/2)] and absmax float32 [blocks]; True if all finite."""
    values = np.empty(LARGEST_BLOCK, np.float32)
    bits = values.view(np.uint32)
    scale = np.empty(1, np.float32)
    scale_bits = scale.view(np.uint32)
    codes = np.empty(LARGEST_BLOCK + 1, np.uint8)
    largest_of_all = np.uint16(0)
    for block in range(raw.size // block_size):
        start = block * block_size
        largest = np.uint16(0)
        for i in range(block_size):
            largest = max(largest, raw[start + i] & np.uint16(0x7FFF))
        largest_of_all = max(largest_of_all, largest)
        scale_bits[0] = np.uint32(largest) << np.uint32(16)
        absmax[block] = scale[0]
        reciprocal = np.float32(1) / max(scale[0], SMALLEST_DIVISOR)
        for i in range(block_size):
            bits[i] = np.uint32(raw[start + i]) << np.uint32(16)
        for i in range(block_size):
            codes[i] = np.uint8(_code(values[i] * reciprocal))
        first = start // 2
        for i in range(block_size // 2):
            packed[first + i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]
    tail = raw.size % block_size
    if tail:
        start = raw.size - tail
        for i in range(tail):
            largest_of_all = max(largest_of_all, raw[start + i] & np.uint16(0x7FFF))
            bits[i] = np.uint32(raw[start + i]) << np.uint32(16)
        _encode_tail(values, tail, codes, packed, start // 2, absmax)
    return largest_of_all < BF16_INFINITY


@inline
def _f16_to_f32_bits(half):
    """Move a float16's sign, exponent and fraction to float32's places; times F16_SCALE that is the value."""
    wide = np.uint32(half)
    return ((wide & np.uint32(0x8000)) << np.uint32(16)) | ((wide & np.uint32(0x7FFF)) << np.uint32(13))


@jit
def encode_f16(raw, block_size, packed, absmax):
    """Encode float16 bits uint16 [n]; outputs as `encode_bf16`."""
    values = np.empty(LARGEST_BLOCK, np.float32)
    bits = values.view(np.uint32)
    scale = np.empty(1, np.float32)
    scale_bits = scale.view(np.uint32)
    codes = np.empty(LARGEST_BLOCK + 1, np.uint8)
    largest_of_all = np.uint16(0)
    for block in range(raw.size // block_size):
        start = block * block_size
        largest = np.uint16(0)
        for i in range(block_size):
            largest = max(largest, raw[start + i] & np.uint16(0x7FFF))
        largest_of_all = max(largest_of_all, largest)
        scale_bits[0] = np.uint32(largest) << np.uint32(13)
        absmax[block] = scale[0] * F16_SCALE
        reciprocal = np.float32(1) / max(absmax[block], SMALLEST_DIVISOR)
        for i in range(block_size):
            bits[i] = _f16_to_f32_bits(raw[start + i])
        for i in range(block_size):
            codes[i] = np.uint8(_code(values[i] * F16_SCALE * reciprocal))
        first = start // 2
        for i in range(block_size // 2):
            packed[first + i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]
    tail = raw.size % block_size
    if tail:
        start = raw.size - tail
        for i in range(tail):
            largest_of_all = max(largest_of_all, raw[start + i] & np.uint16(0x7FFF))
            bits[i] = _f16_to_f32_bits(raw[start + i])
        for i in range(tail):
            values[i] = values[i] * F16_SCALE
        _encode_tail(values, tail, codes, packed, start // 2, absmax)
    return largest_of_all < F16_INFINITY


@jit
def encode_f32(raw, block_size, packed, absmax):
    """Encode float32 [n]; outputs as `encode_bf16`."""
    values = np.empty(LARGEST_BLOCK, np.float32)
    raw_bits = raw.view(np.uint32)
    scale = np.empty(1, np.float32)
    scale_bits = scale.view(np.uint32)
    codes = np.empty(LARGEST_BLOCK + 1, np.uint8)
    largest_of_all = np.uint32(0)
    for block in range(raw.size // block_size):
        start = block * block_size
        largest = np.uint32(0)
        for i in range(block_size):
            largest = max(largest, raw_bits[start + i] & np.uint32(0x7FFFFFFF))
        largest_of_all = max(largest_of_all, largest)
        scale_bits[0] = largest
        absmax[block] = scale[0]
        reciprocal = np.float32(1) / max(scale[0], SMALLEST_DIVISOR)
        for i in range(block_size):
            codes[i] = np.uint8(_code(raw[start + i] * reciprocal))
        first = start // 2
        for i in range(block_size // 2):
            packed[first + i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]
    tail = raw.size % block_size
    if tail:
        start = raw.size - tail
        for i in range(tail):
            largest_of_all = max(largest_of_all, raw_bits[start + i] & np.uint32(0x7FFFFFFF))
            values[i] = raw[start + i]
        _encode_tail(values, tail, codes, packed, start // 2, absmax)
    return largest_of_all < F32_INFINITY


@jit
def add_in_order(values, total):
    """Return the float64 `total` plus float32 values [n], added one after another in index order."""
    for i in range(values.size):
        total += np.float64(values[i])
    return total


@jit
def encode_absmax(absmax, offset, codes, nested_absmax):
    """Encode absmax float32 [n] into codes uint8 [n] and nested_absmax float32 [ceil(n/256)]."""
    centered = np.empty(NESTED_BLOCK_SIZE, np.float32)
    for group in range(nested_absmax.size):
        start = group * NESTED_BLOCK_SIZE
        size = min(NESTED_BLOCK_SIZE, absmax.size - start)
        largest = np.float32(0)
        for i in range(size):
            centered[i] = absmax[start + i] - offset
            largest = max(largest, abs(centered[i]))
        nested_absmax[group] = largest
        if largest == 0:
            for i in range(size):
                codes[start + i] = 0
            continue
        for i in range(size):
            value = centered[i] / largest
            # Binary search without branches for the number of thresholds below: eight halvings of 256.
            code = 0
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                code += step * np.int64(DYNAMIC_THRESHOLDS[code + step - 1] < value)
            codes[start + i] = np.uint8(code)


@jit
def decode_scales(codes, nested_absmax, nested_quant_map, offset, first_block, scales):
    """Decode absmax codes uint8 [n] of blocks first_block, ... into float32 [n]: product and sum each rounded."""
    for i in range(codes.size):
        scales[i] = nested_quant_map[codes[i]] * nested_absmax[(first_block + i) // NESTED_BLOCK_SIZE] + offset


@inline
def bf16_table(scale, products, product_bits, table):
    """Fill table uint16 [>= 16] with the bfloat16 bits of codebook times scale, nearest even; NaN becomes 0x7FC0."""
    for i in range(16):
        products[i] = NF4_CODEBOOK[i] * scale
    for i in range(16):
        bits = product_bits[i]
        rounded = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > F32_INFINITY
        table[i] = np.uint16((bits >> np.uint32(16)) | np.uint32(0x40)) if is_nan else rounded


@inline
def f16_table(scale, products, product_bits, table):
    """Fill table uint16 [>= 16] with the float16 bits of codebook times scale, nearest even, overflow to infinity."""
    for i in range(16):
        products[i] = NF4_CODEBOOK[i] * scale
    for i in range(16):
        bits = product_bits[i]
        sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
        magnitude = bits & np.uint32(0x7FFFFFFF)
        if magnitude > F32_INFINITY:
            table[i] = np.uint16(sign | np.uint32(0x7E00) | ((bits >> np.uint32(13)) & np.uint32(0x3FF)))
        elif magnitude >= np.uint32(0x477FF000):  # 65520, half way between the largest value and the next
            table[i] = np.uint16(sign | np.uint32(0x7C00))
        elif magnitude < np.uint32(0x38800000):  # below 2**-14: adding 0.5 leaves units of 2**-24, rounded by the FPU
            products[i] = abs(products[i]) + np.float32(0.5)
            table[i] = np.uint16(sign | (product_bits[i] - np.uint32(0x3F000000)))
        else:
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            table[i] = np.uint16(sign | ((magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)))


@inline
def lookup_block(packed, start, size, table, out):
    """Write `size` elements from `start` on, looking each code of packed uint8 up in table [16]."""
    for i in range(start // 2, (start + size) // 2):
        byte = packed[i]
        out[2 * i] = table[byte >> np.uint8(4)]
        out[2 * i + 1] = table[byte & np.uint8(15)]
    if size % 2:
        out[start + size - 1] = table[packed[(start + size) // 2] >> np.uint8(4)]


@jit
def decode_bf16(packed, scales, block_size, out):
    """Decode packed uint8 [ceil(n/2)] with scales float32 [blocks] into bfloat16 bits uint16 [n]."""
    products = np.empty(16, np.float32)
    product_bits = products.view(np.uint32)
    table = np.empty(16, np.uint16)
    for block in range(scales.size):
        bf16_table(scales[block], products, product_bits, table)
        lookup_block(packed, block * block_size, min(block_size, out.size - block * block_size), table, out)


@jit
def decode_f16(packed, scales, block_size, out):
    """Decode into float16 bits uint16 [n]; inputs as `decode_bf16`."""
    products = np.empty(16, np.float32)
    product_bits = products.view(np.uint32)
    table = np.empty(16, np.uint16)
    for block in range(scales.size):
        f16_table(scales[block], products, product_bits, table)
        lookup_block(packed, block * block_size, min(block_size, out.size - block * block_size), table, out)


@jit
def decode_f32(packed, scales, block_size, out):
    """Decode into float32 [n]; inputs as `decode_bf16`."""
    table = np.empty(16, np.float32)
    for block in range(scales.size):
        for i in range(16):
            table[i] = NF4_CODEBOOK[i] * scales[block]
        lookup_block(packed, block * block_size, min(block_size, out.size - block * block_size), table, out)
