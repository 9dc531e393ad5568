"""Portable numba kernels of the codec, bit-identical to the reference implementation. They run without the GIL.

    block j of a weight                                               one byte of `packed`

    raw     [j * size ...... (j + 1) * size)                           7 6 5 4   3 2 1 0
              | largest magnitude  -> absmax[j]                       +---------+---------+
              | * 1 / absmax[j]    -> scaled weights in [-1, 1]       | code of | code of |
              | thresholds below   -> codes 0 ... 15                  | w[2i]   | w[2i+1] |
    packed  [j * size / 2 .. (j + 1) * size / 2)                      +---------+---------+

The kernels process complete blocks and check nothing. `qformat.codec.cpu.blocks` checks the sizes and handles a partial
last block. fastmath is off, because reassociation or a fused multiply-add would change bits.

Each loop does one simple operation on the few hundred bytes of a block, so that LLVM vectorises it. Loops run over
slices that begin at 0, because an index `start + i` could be negative and then count from the end (950 instead of
1,370 M float16 weights encoded per second and thread with AVX-512).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.typing.templates import Signature
from numpy.typing import NDArray

from qformat.codec.codebooks import DYNAMIC_THRESHOLDS, NF4_CODEBOOK
from qformat.codec.cpu.code_cache import cached
from qformat.codec.cpu.scalars import is_finite, magnitude, magnitude_bits, narrowed, nearest_code, widened
from qformat.codec.floats import FloatFormat
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import BLOCK_SIZES, SMALLEST_DIVISOR

LARGEST_BLOCK = max(BLOCK_SIZES)


class Kernel:
    """A numba function with a single signature, compiled on the first call or before.

    The signature allows read-only inputs and unaligned arrays, so that views of a mapped file run the same machine code
    as other arrays. Literal arguments at the end of the signature select a variant of the function.
    """

    def __init__(self, dispatcher: Any, signature: Signature) -> None:
        self._dispatcher = dispatcher
        self._signature = signature
        self.constants = tuple(a.literal_value for a in signature.args if isinstance(a, types.StringLiteral))
        self._entry: Callable[..., Any] | None = None

    def compile(self) -> Callable[..., Any]:
        """Load the machine code from the cache on disk, or compile it (about 0.5 s)."""
        if self._entry is None:
            self._entry = self._dispatcher.compile(self._signature)
        return self._entry

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel. The literal arguments are added. Types are not checked: a wrong dtype would be misread."""
        return (self._entry or self.compile())(*arguments, *self.constants)


def jit(function: Callable[..., Any], *, any_order: bool = False) -> Any:
    """Compile a function with numba on demand, and keep the machine code on disk if that is possible.

    Args:
        function: Function to compile.
        any_order: Allow the order of additions to depend on the CPU, for results that need not be bit-identical.
    """
    fastmath: Any = {"reassoc", "contract"} if any_order else False
    return cached(numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function), function)


def kernel(signature: Signature) -> Callable[[Callable[..., Any]], Kernel]:
    """Return a decorator that turns a function into a `Kernel` with a signature."""
    return lambda function: Kernel(jit(function), signature)


def taken(element: types.Type) -> types.Array:
    """Return numba's type of a one-dimensional array that is only read."""
    return types.Array(element, 1, "C", readonly=True, aligned=False)


def filled(element: types.Type) -> types.Array:
    """Return numba's type of a one-dimensional array that is written."""
    return types.Array(element, 1, "C", aligned=False)


def raw_type(float_format: FloatFormat) -> types.Type:
    """Return numba's type of a raw element."""
    return types.float32 if float_format is FloatFormat.F32 else types.uint16


def format_literal(float_format: FloatFormat) -> Any:
    """Return numba's type of the literal argument that selects a float format."""
    return types.literal(float_format.value)


def encoder_signature(element: types.Type, *variant: types.Type) -> Signature:
    """Return the signature of encode(raw [n], block_size, packed [n/2], absmax [n/block_size]) -> all finite.

    Args:
        element: Type of a raw element.
        variant: Types of literal arguments.
    """
    return types.boolean(taken(element), types.int64, filled(types.uint8), filled(types.float32), *variant)


def decoder_signature(element: types.Type, *variant: types.Type) -> Signature:
    """Return the signature of decode(packed [n/2], scales [n/block_size], block_size, out [n]).

    Args:
        element: Type of a raw element.
        variant: Types of literal arguments.
    """
    return types.void(taken(types.uint8), taken(types.float32), types.int64, filled(element), *variant)


@jit
def _encode(raw: Any, block_size: Any, packed: Any, absmax: Any, float_format: Any) -> Any:
    """Encode complete blocks of raw elements and return whether all elements are finite."""
    codes = np.empty(LARGEST_BLOCK, np.uint8)
    pairs = codes.view(np.uint16)  # little-endian: the first code of a pair is the low byte
    all_finite = True
    for block in range(absmax.size):
        start = block * block_size
        weights = raw[start : start + block_size]
        largest = magnitude_bits(weights[0], float_format)
        for i in range(weights.size):
            largest = max(largest, magnitude_bits(weights[i], float_format))
        all_finite &= is_finite(largest, float_format)
        scale = magnitude(largest, float_format)
        absmax[block] = scale
        reciprocal = np.float32(1) / max(scale, SMALLEST_DIVISOR)
        for i in range(weights.size):
            codes[i] = np.uint8(nearest_code(widened(weights[i], float_format) * reciprocal))
        packed_here = packed[start // 2 : (start + block_size) // 2]
        for i in range(packed_here.size):
            packed_here[i] = np.uint8((pairs[i] << np.uint16(4)) | (pairs[i] >> np.uint16(8)))
    return all_finite


@kernel(types.float64(taken(types.float32), types.float64))
def add_in_order(values: Any, total: Any) -> Any:
    """Add values to a sum in index order.

    Args:
        values: Values to add, float32 [n].
        total: Sum so far, in float64.

    Returns:
        The new sum.
    """
    for i in range(values.size):
        total += np.float64(values[i])
    return total


# The sign, the exponent and the first 6 fraction bits of a value select its bucket. A bucket contains at most one
# threshold of the dynamic map (near 1, thresholds are 0.014 apart and a bucket is 0.008 wide), so one comparison
# completes the search: 410 M values/s instead of 170 M with a binary search.
_BUCKET_SHIFT = np.uint32(17)
_FIRST_BUCKET = np.uint32((127 - 23) << 6)
"""Bucket of 2**-23 and everything smaller. The smallest threshold is 2**-21."""
_LAST_BUCKET = np.uint32(127 << 6)
"""Bucket of 1, the largest value."""
_N_BUCKETS = np.uint32(_LAST_BUCKET - _FIRST_BUCKET + 1)


def _bucket_codes() -> NDArray[np.uint8]:
    """Return the code of the least value of each bucket, for positive values and then for negative values."""
    prefixes = np.arange(_FIRST_BUCKET, _LAST_BUCKET + 1, dtype=np.uint32) << _BUCKET_SHIFT
    nearest_zero = prefixes.view(np.float32).copy()
    nearest_zero[0] = 0
    farthest = (prefixes | ((np.uint32(1) << _BUCKET_SHIFT) - np.uint32(1))).view(np.float32)
    return np.searchsorted(DYNAMIC_THRESHOLDS, np.append(nearest_zero, -farthest), side="left").astype(np.uint8)


BUCKET_CODES = _bucket_codes()
_THRESHOLD_ABOVE = np.append(DYNAMIC_THRESHOLDS, np.float32(np.inf)).astype(np.float32)


@kernel(types.void(taken(types.float32), types.float32, filled(types.uint8), filled(types.float32)))
def encode_absmax(absmax: Any, offset: Any, codes: Any, nested_absmax: Any) -> None:
    """Encode absmax values.

    Args:
        absmax: Absmax values, float32 [n].
        offset: Mean of the absmax values of the entire weight.
        codes: Array for the codes, uint8 [n].
        nested_absmax: Array for the nested absmax values, float32 [ceil(n / 256)].
    """
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
    """Decode the absmax codes of consecutive blocks. The product and the sum are each rounded to float32.

    Args:
        codes: Codes of the absmax values, uint8 [n].
        nested_absmax: Nested absmax values, float32.
        nested_quant_map: Codebook of the absmax values, float32 [256].
        offset: Mean of the absmax values.
        first_block: Index of the first block relative to `nested_absmax`.
        scales: Array for the scales, float32 [n].
    """
    for i in range(codes.size):
        scales[i] = nested_quant_map[codes[i]] * nested_absmax[(first_block + i) // NESTED_BLOCK_SIZE] + offset


@jit
def _decode(packed: Any, scales: Any, block_size: Any, out: Any, float_format: Any) -> None:
    """Decode complete blocks. The 16 possible values of a block are computed and rounded once, then looked up."""
    table = np.empty(16, out.dtype)
    for block in range(scales.size):
        for i in range(16):
            table[i] = narrowed(NF4_CODEBOOK[i] * scales[block], float_format)
        first = block * block_size // 2
        for i in range(first, first + block_size // 2):
            byte = packed[i]
            out[2 * i] = table[byte >> np.uint8(4)]
            out[2 * i + 1] = table[byte & np.uint8(15)]


def _variants(function: Any, signature: Callable[..., Signature]) -> dict[FloatFormat, Kernel]:
    return {each: Kernel(function, signature(raw_type(each), format_literal(each))) for each in FloatFormat}


ENCODERS = _variants(_encode, encoder_signature)
DECODERS = _variants(_decode, decoder_signature)
