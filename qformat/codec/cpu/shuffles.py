"""Encoding and decoding with AVX-512 or AVX2, bit-identical to the portable kernels and many times faster.

    decode   bytes of `packed`   | hi:lo | hi:lo | hi:lo | ...
             codes               | c0 c1 | c2 c3 | c4 c5 | ...            4 bits each, the high nibble first
             table of a block    | v0 v1 v2 ... v15 |                     codebook * scale, rounded once
             values              | table[c0] table[c1] table[c2] ...      one shuffle instruction

    encode   scaled weight s     -> k = round(cubic(s))                   the code is k or k + 1
             code                 = k + (s > thresholds[k])               one shuffle and one comparison

LLVM vectorises simple loops, but does not use table lookups in registers. The inner steps are therefore written as LLVM
vector operations and given to numba as intrinsics:

- Decoding uses a code as the index into the 16 possible values of its block (`vpermw`, `vpshufb`, `vpermps`).
- Encoding estimates the number of thresholds below a scaled weight with a cubic polynomial. The lookup of one threshold
  and one comparison replace fifteen comparisons (`vpermps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from qformat.codec.codebooks import NF4_CODEBOOK, NF4_THRESHOLDS
from qformat.codec.cpu.kernels import Kernel, decoder_signature, encoder_signature, jit, raw_type
from qformat.codec.cpu.lanes import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    NEEDED_FEATURES,
    Lanes,
    Memory,
    Shuffle,
    as_float,
    call,
    look_up_floats,
    look_up_shorts,
    narrowed,
    steps,
    widened,
)
from qformat.codec.cpu.scalars import F32_INFINITY
from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import SMALLEST_DIVISOR

GUESS = (-4.3935, 0.5644, 11.5123, 6.6778)
"""Coefficients of the cubic polynomial, highest power first. At threshold i its value differs from i by at most 0.21.
While the error is below 0.5, a scaled weight has the code k or k + 1, where k is the rounded value. float32 rounding
adds only 1e-6."""
_ROUND_TO_INTEGER = 1.5 * 2**23
"""The sum of this and a small float32 has the nearest integer in its lowest bits."""

ENCODED_AT_ONCE = 64
"""Number of weights to encode at a time, even with blocks of 32. The encoder processes multiples of it."""
_DECODED_AT_ONCE = 32


def _raw_element(float_format: FloatFormat) -> ir.Type:
    return F32 if float_format is FloatFormat.F32 else I16


def _codes(scaled: Lanes, shuffle: Shuffle) -> Lanes:
    """Return the number of thresholds below each scaled weight, as i32 lanes."""
    cubic, square, linear, constant = GUESS
    guess = Lanes.constant(scaled.builder, F32, [cubic] * scaled.count)
    for coefficient in (square, linear, constant):
        guess = guess.times_plus(scaled, coefficient)
    index = (guess + _ROUND_TO_INTEGER).reread(I32)
    thresholds = Lanes.constant(scaled.builder, F32, [*NF4_THRESHOLDS, np.inf])
    above = scaled > look_up_floats(thresholds, index, shuffle)
    return (index + above.widen(I32)) & 15


@steps
def _largest_magnitude(_: Any, raw: Any, start: Any, count: Any, float_format: Any) -> Any:
    """Return the largest magnitude of raw[start:start + count] as the bits of a float32. `count` is a literal."""
    source = FloatFormat(float_format.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = I32 if source is FloatFormat.F32 else I16
        n = count.literal_value
        loaded = Memory(context, builder, signature.args[0], arguments[0]).load(arguments[1], integer, n)
        magnitudes = loaded & (0x7FFFFFFF if source is FloatFormat.F32 else 0x7FFF)
        largest = call(builder, f"llvm.vector.reduce.umax.v{n}i{integer.width}", integer, magnitudes.value)
        if source is FloatFormat.F32:
            return largest
        if source is FloatFormat.F16:
            return builder.bitcast(builder.fpext(builder.bitcast(largest, F16), F32), I32)
        return builder.shl(builder.zext(largest, I32), ir.Constant(I32, 16))

    return types.uint32(raw, start, count, float_format), generate


@steps
def _encode_64(
    _: Any, raw: Any, start: Any, first_factor: Any, second_factor: Any, packed: Any, float_format: Any, shuffle: Any
) -> Any:
    """Encode raw[start:start + 64] into packed[start / 2:]. Each half has its own factor."""
    source = FloatFormat(float_format.literal_value)
    count = 16 if shuffle.literal_value == "avx512" else 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = Memory(context, builder, signature.args[0], arguments[0])
        factors = [Lanes.repeat(builder, factor, count) for factor in arguments[2:4]]
        parts = []
        for done in range(0, ENCODED_AT_ONCE, count):
            index = builder.add(arguments[1], ir.Constant(I64, done))
            values = widened(memory.load(index, _raw_element(source), count), source)
            parts.append(_codes(values * factors[2 * done // ENCODED_AT_ONCE], shuffle.literal_value))
        while len(parts) > 1:
            parts = [left.join(right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
        pairs = parts[0].cut(I8).reread(I16)  # little-endian: the first code of a pair is the low byte
        half_start = builder.lshr(arguments[1], ir.Constant(I64, 1))
        Memory(context, builder, signature.args[4], arguments[4]).store(half_start, (pairs << 4 | pairs >> 8).cut(I8))
        return context.get_dummy_value()

    signature = types.void(raw, start, first_factor, second_factor, packed, float_format, shuffle)
    return signature, generate


@steps
def _decode_block(
    _: Any, packed: Any, start: Any, size: Any, scale: Any, out: Any, float_format: Any, shuffle: Any
) -> Any:
    """Decode one block into out[start:start + size]."""
    target = FloatFormat(float_format.literal_value)
    instructions = shuffle.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes = Memory(context, builder, signature.args[0], arguments[0])
        result = Memory(context, builder, signature.args[4], arguments[4])
        _, start, size, scale, *_ = arguments
        products = Lanes.constant(builder, F32, NF4_CODEBOOK) * Lanes.repeat(builder, scale, 16)
        table = narrowed(products, target)
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), size, ir.Constant(I64, _DECODED_AT_ONCE)) as (
            done,
            _count,
        ):
            index = builder.add(start, done)
            half_index = builder.lshr(index, ir.Constant(I64, 1))
            if target is not FloatFormat.F32:
                result.store(index, look_up_shorts(table, codes.load(half_index, I8, 16), instructions))
            else:
                at_once = 16 if instructions == "avx512" else 8
                for part in range(0, _DECODED_AT_ONCE, at_once):
                    here = builder.add(half_index, ir.Constant(I64, part // 2))
                    pairs = codes.load(here, I8, at_once // 2).widen(I64)
                    indices = (pairs >> 4 | pairs << 32).reread(I32)
                    there = builder.add(index, ir.Constant(I64, part))
                    result.store(there, look_up_floats(table, indices, instructions))
        return context.get_dummy_value()

    return types.void(packed, start, size, scale, out, float_format, shuffle), generate


@jit
def _encode(raw: Any, block_size: Any, packed: Any, absmax: Any, float_format: Any, shuffle: Any) -> Any:
    """Encode complete blocks, a multiple of 64 weights, and return whether all weights are finite."""
    largest_of_all = np.uint32(0)
    if block_size == 32:
        for pair in range(absmax.size // 2):
            start = 64 * pair
            first = _largest_magnitude(raw, start, 32, float_format)
            second = _largest_magnitude(raw, start + 32, 32, float_format)
            largest_of_all = max(largest_of_all, first, second)
            absmax[2 * pair] = as_float(first)
            absmax[2 * pair + 1] = as_float(second)
            first_factor = np.float32(1) / max(as_float(first), SMALLEST_DIVISOR)
            second_factor = np.float32(1) / max(as_float(second), SMALLEST_DIVISOR)
            _encode_64(raw, start, first_factor, second_factor, packed, float_format, shuffle)
    else:
        for block in range(absmax.size):
            largest = np.uint32(0)
            for start in range(block * block_size, (block + 1) * block_size, 64):
                largest = max(largest, _largest_magnitude(raw, start, 64, float_format))
            largest_of_all = max(largest_of_all, largest)
            absmax[block] = as_float(largest)
            factor = np.float32(1) / max(as_float(largest), SMALLEST_DIVISOR)
            for start in range(block * block_size, (block + 1) * block_size, 64):
                _encode_64(raw, start, factor, factor, packed, float_format, shuffle)
    return largest_of_all < F32_INFINITY


@jit
def _decode(packed: Any, scales: Any, block_size: Any, out: Any, float_format: Any, shuffle: Any) -> None:
    """Decode complete blocks."""
    for block in range(scales.size):
        _decode_block(packed, block * block_size, block_size, scales[block], out, float_format, shuffle)


def _variants(function: Any, signature: Callable[..., Any]) -> dict[tuple[Shuffle, FloatFormat], Kernel]:
    def variant(shuffle: Shuffle, float_format: FloatFormat) -> Kernel:
        return Kernel(
            function, signature(raw_type(float_format), types.literal(float_format.value), types.literal(shuffle))
        )

    return {(shuffle, each): variant(shuffle, each) for shuffle in NEEDED_FEATURES for each in FloatFormat}


ENCODERS = _variants(_encode, encoder_signature)
DECODERS = _variants(_decode, decoder_signature)
