"""The plain numba kernels of the codec, for every CPU: bit for bit the reference, on plain arrays, without the GIL.

They check nothing and take whole blocks only: sizes, and the last partial block of a tensor, are the business of
`qformat.codec.cpu.blocks`, their only caller. fastmath stays off: reassociation or a fused multiply-add would change
bits.
Each loop does one simple thing on a few hundred bytes, so that LLVM vectorises it; slices and helper arrays that might
alias keep it from doing so (1,050 against 320 million weights a second and thread, measured on AVX-512).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.typing.templates import Signature
from numpy.typing import NDArray

from qformat.codec.codebooks import DYNAMIC_THRESHOLDS, NF4_CODEBOOK, NF4_THRESHOLDS
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import BLOCK_SIZES, SMALLEST_DIVISOR

LARGEST_BLOCK = max(BLOCK_SIZES)
BF16_INFINITY = np.uint16(0x7F80)
F16_INFINITY = np.uint16(0x7C00)
F32_INFINITY = np.uint32(0x7F800000)
F16_SCALE = np.float32(2.0**112)
"""float16 bits moved to float32's place, times this, are the value: it corrects the exponent, subnormals included."""


class Kernel:
    """A numba function and the one signature it is compiled for, at its first call at the latest.

    The signature says that inputs may be read-only and that no array need be aligned: views of a mapped file run the
    same machine code as fresh arrays. Literal arguments choose among variants of one function: they end the list.
    """

    def __init__(self, dispatcher: Any, signature: Signature) -> None:
        self._dispatcher = dispatcher
        self._signature = signature
        self.constants = tuple(a.literal_value for a in signature.args if isinstance(a, types.StringLiteral))
        self._entry: Callable[..., Any] | None = None

    def compile(self) -> Callable[..., Any]:
        """Load the machine code from the cache on disk, or compile it (about half a second)."""
        if self._entry is None:
            self._entry = self._dispatcher.compile(self._signature)
        return self._entry

    def __call__(self, *arguments: Any) -> Any:
        """Run with all arguments but the literal ones. Types are not checked: a wrong dtype would be misread."""
        return (self._entry or self.compile())(*arguments, *self.constants)


def jit(function: Callable[..., Any], *, any_order: bool = False) -> Any:
    """Hand a function to numba, to be compiled on demand, cached beside the source or in the user's cache folder.

    any_order: sums may be taken in the order that suits the CPU, for results that need not be the reference's bits.
    """
    fastmath: Any = {"reassoc", "contract"} if any_order else False
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True, fastmath=fastmath)(function)
    except RuntimeError:  # neither folder can be written: compile in every process
        return numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)


def kernel(signature: Signature) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function with one signature a `Kernel`."""
    return lambda function: Kernel(jit(function), signature)


def taken(element: types.Type) -> types.Array:
    """Return the type of a one-dimensional array that is only read."""
    return types.Array(element, 1, "C", readonly=True, aligned=False)


def filled(element: types.Type) -> types.Array:
    """Return the type of a one-dimensional array that is written."""
    return types.Array(element, 1, "C", aligned=False)


def encoder_signature(element: types.Type, *variant: types.Type) -> Signature:
    """all_finite = encode(raw [n], block_size, packed [n/2], absmax [n/block_size])."""
    return types.boolean(taken(element), types.int64, filled(types.uint8), filled(types.float32), *variant)


def decoder_signature(element: types.Type, *variant: types.Type) -> Signature:
    """decode(packed [n/2], scales [n/block_size], block_size, out [n])."""
    return types.void(taken(types.uint8), taken(types.float32), types.int64, filled(element), *variant)


_inline = numba.njit(inline="always")
(_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9, _T10, _T11, _T12, _T13, _T14) = NF4_THRESHOLDS


@_inline
def _code(value: Any) -> Any:
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


@kernel(encoder_signature(types.uint16))
def encode_bf16(raw: Any, block_size: Any, packed: Any, absmax: Any) -> Any:
    """Encode whole blocks of bfloat16 bits; return whether all are finite."""
    values = np.empty(LARGEST_BLOCK, np.float32)
    bits = values.view(np.uint32)
    scale = np.empty(1, np.float32)
    scale_bits = scale.view(np.uint32)
    codes = np.empty(LARGEST_BLOCK, np.uint8)
    largest_of_all = np.uint16(0)
    for block in range(absmax.size):
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
    return largest_of_all < BF16_INFINITY


@kernel(encoder_signature(types.uint16))
def encode_f16(raw: Any, block_size: Any, packed: Any, absmax: Any) -> Any:
    """Encode whole blocks of float16 bits; return whether all are finite."""
    values = np.empty(LARGEST_BLOCK, np.float32)
    bits = values.view(np.uint32)
    scale = np.empty(1, np.float32)
    scale_bits = scale.view(np.uint32)
    codes = np.empty(LARGEST_BLOCK, np.uint8)
    largest_of_all = np.uint16(0)
    for block in range(absmax.size):
        start = block * block_size
        largest = np.uint16(0)
        for i in range(block_size):
            largest = max(largest, raw[start + i] & np.uint16(0x7FFF))
        largest_of_all = max(largest_of_all, largest)
        scale_bits[0] = np.uint32(largest) << np.uint32(13)
        absmax_here = scale[0] * F16_SCALE
        absmax[block] = absmax_here
        reciprocal = np.float32(1) / max(absmax_here, SMALLEST_DIVISOR)
        for i in range(block_size):
            half = np.uint32(raw[start + i])
            bits[i] = ((half & np.uint32(0x8000)) << np.uint32(16)) | ((half & np.uint32(0x7FFF)) << np.uint32(13))
        for i in range(block_size):
            codes[i] = np.uint8(_code(values[i] * F16_SCALE * reciprocal))
        first = start // 2
        for i in range(block_size // 2):
            packed[first + i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]
    return largest_of_all < F16_INFINITY


@kernel(encoder_signature(types.float32))
def encode_f32(raw: Any, block_size: Any, packed: Any, absmax: Any) -> Any:
    """Encode whole blocks of float32; return whether all are finite."""
    values = np.empty(LARGEST_BLOCK, np.float32)
    bits = values.view(np.uint32)
    scale = np.empty(1, np.float32)
    scale_bits = scale.view(np.uint32)
    codes = np.empty(LARGEST_BLOCK, np.uint8)
    largest_of_all = np.uint32(0)
    for block in range(absmax.size):
        start = block * block_size
        for i in range(block_size):
            values[i] = raw[start + i]
        largest = np.uint32(0)
        for i in range(block_size):
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
        largest_of_all = max(largest_of_all, largest)
        scale_bits[0] = largest
        absmax[block] = scale[0]
        reciprocal = np.float32(1) / max(scale[0], SMALLEST_DIVISOR)
        for i in range(block_size):
            codes[i] = np.uint8(_code(values[i] * reciprocal))
        first = start // 2
        for i in range(block_size // 2):
            packed[first + i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]
    return largest_of_all < F32_INFINITY


@kernel(types.float64(taken(types.float32), types.float64))
def add_in_order(values: Any, total: Any) -> Any:
    """Return the float64 `total` plus float32 values [n], added one after another in index order."""
    for i in range(values.size):
        total += np.float64(values[i])
    return total


# A value's sign, exponent and first 6 fraction bits choose its bucket. No bucket holds more than one threshold of the
# dynamic map (their distance is 0.014 near 1, a bucket's width 0.008), so a look at one threshold finishes the search:
# 410 million values a second, 170 with eight halvings of 256.
_BUCKET_SHIFT = np.uint32(17)
_FIRST_BUCKET = np.uint32((127 - 23) << 6)
"""Of 2**-23 and all that is smaller: the smallest threshold is 2**-21."""
_LAST_BUCKET = np.uint32(127 << 6)
"""Of 1: no value is larger."""
_N_BUCKETS = np.uint32(_LAST_BUCKET - _FIRST_BUCKET + 1)


def _bucket_codes() -> NDArray[np.uint8]:
    """Return the code of the least value of each bucket: those of positive values, then those of negative values."""
    prefixes = np.arange(_FIRST_BUCKET, _LAST_BUCKET + 1, dtype=np.uint32) << _BUCKET_SHIFT
    nearest_zero = prefixes.view(np.float32).copy()
    nearest_zero[0] = 0
    farthest = (prefixes | ((np.uint32(1) << _BUCKET_SHIFT) - np.uint32(1))).view(np.float32)
    return np.searchsorted(DYNAMIC_THRESHOLDS, np.append(nearest_zero, -farthest), side="left").astype(np.uint8)


BUCKET_CODES = _bucket_codes()
_THRESHOLD_ABOVE = np.append(DYNAMIC_THRESHOLDS, np.float32(np.inf)).astype(np.float32)


@kernel(types.void(taken(types.float32), types.float32, filled(types.uint8), filled(types.float32)))
def encode_absmax(absmax: Any, offset: Any, codes: Any, nested_absmax: Any) -> None:
    """Encode absmax float32 [n] into codes uint8 [n] and nested_absmax float32 [ceil(n/256)]."""
    scaled = np.empty(NESTED_BLOCK_SIZE, np.float32)
    bits = scaled.view(np.uint32)
    for group in range(nested_absmax.size):
        start = group * NESTED_BLOCK_SIZE
        size = min(NESTED_BLOCK_SIZE, absmax.size - start)
        largest = np.float32(0)
        for i in range(size):
            scaled[i] = absmax[start + i] - offset
            largest = max(largest, abs(scaled[i]))
        nested_absmax[group] = largest
        if largest == 0:
            for i in range(size):
                codes[start + i] = 0
            continue
        for i in range(size):
            scaled[i] = scaled[i] / largest
        for i in range(size):
            magnitude = (bits[i] & np.uint32(0x7FFFFFFF)) >> _BUCKET_SHIFT
            bucket = min(max(magnitude, _FIRST_BUCKET), _LAST_BUCKET) - _FIRST_BUCKET
            code = np.uint32(BUCKET_CODES[bucket + (bits[i] >> np.uint32(31)) * _N_BUCKETS])
            codes[start + i] = np.uint8(code + np.uint32(scaled[i] > _THRESHOLD_ABOVE[code]))


@kernel(
    types.void(
        taken(types.uint8),
        taken(types.float32),
        taken(types.float32),
        types.float32,
        types.int64,
        filled(types.float32),
    )
)
def decode_scales(
    codes: Any, nested_absmax: Any, nested_quant_map: Any, offset: Any, first_block: Any, scales: Any
) -> None:
    """Decode absmax codes uint8 [n] of blocks first_block, ... into float32 [n]: product and sum each rounded."""
    for i in range(codes.size):
        scales[i] = nested_quant_map[codes[i]] * nested_absmax[(first_block + i) // NESTED_BLOCK_SIZE] + offset


@_inline
def _look_up(packed: Any, first: Any, n_bytes: Any, table: Any, out: Any) -> None:
    """Write the table's entries for the codes of packed[first:first + n_bytes]."""
    for i in range(first, first + n_bytes):
        byte = packed[i]
        out[2 * i] = table[byte >> np.uint8(4)]
        out[2 * i + 1] = table[byte & np.uint8(15)]


@kernel(decoder_signature(types.uint16))
def decode_bf16(packed: Any, scales: Any, block_size: Any, out: Any) -> None:
    """Decode whole blocks into bfloat16 bits: the block's 16 products are rounded once, then looked up."""
    products = np.empty(16, np.float32)
    product_bits = products.view(np.uint32)
    table = np.empty(16, np.uint16)
    for block in range(scales.size):
        for i in range(16):
            products[i] = NF4_CODEBOOK[i] * scales[block]
        for i in range(16):
            bits = product_bits[i]
            upper = bits >> np.uint32(16)
            rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
            is_nan = (bits & np.uint32(0x7FFFFFFF)) > F32_INFINITY
            table[i] = np.uint16(upper | np.uint32(0x40) if is_nan else rounded)
        _look_up(packed, block * block_size // 2, block_size // 2, table, out)


@kernel(decoder_signature(types.uint16))
def decode_f16(packed: Any, scales: Any, block_size: Any, out: Any) -> None:
    """Decode whole blocks into float16 bits; products from 65520 on become infinity."""
    products = np.empty(16, np.float32)
    product_bits = products.view(np.uint32)
    table = np.empty(16, np.uint16)
    for block in range(scales.size):
        for i in range(16):
            products[i] = NF4_CODEBOOK[i] * scales[block]
        for i in range(16):
            bits = product_bits[i]
            sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
            magnitude = bits & np.uint32(0x7FFFFFFF)
            if magnitude > F32_INFINITY:
                half = np.uint32(0x7E00)
            elif magnitude >= np.uint32(0x477FF000):  # 65520, half way between the largest value and the next
                half = np.uint32(0x7C00)
            elif magnitude < np.uint32(0x38800000):  # below 2**-14: a sum with 0.5 has units of 2**-24
                products[i] = abs(products[i]) + np.float32(0.5)
                half = product_bits[i] - np.uint32(0x3F000000)
            else:
                odd = (magnitude >> np.uint32(13)) & np.uint32(1)
                half = (magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
            table[i] = np.uint16(sign | half)
        _look_up(packed, block * block_size // 2, block_size // 2, table, out)


@kernel(decoder_signature(types.float32))
def decode_f32(packed: Any, scales: Any, block_size: Any, out: Any) -> None:
    """Decode whole blocks into float32."""
    table = np.empty(16, np.float32)
    for block in range(scales.size):
        for i in range(16):
            table[i] = NF4_CODEBOOK[i] * scales[block]
        _look_up(packed, block * block_size // 2, block_size // 2, table, out)
