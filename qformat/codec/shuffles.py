"""Encode and decode with AVX-512 or AVX2: whole blocks, bit for bit the plain kernels, many times as fast.

LLVM vectorises simple loops by itself, but finds no table lookup inside registers. So the inner steps are written as
LLVM vector operations, with one shuffle instruction each, and offered to numba as intrinsics:

- decode: a code is an index into its block's 16 products, rounded beforehand (`vpermw`, `vpshufb`, `vpermps`);
- encode: a cubic guesses how many thresholds lie below a scaled weight, to within one; a lookup of one threshold
  and one comparison settle it, in place of fifteen comparisons (`vpermps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from qformat.codec.codebooks import NF4_CODEBOOK, NF4_THRESHOLDS
from qformat.codec.floats import FloatFormat
from qformat.codec.kernels import F32_INFINITY, Kernel, decoder_signature, encoder_signature, jit
from qformat.codec.nf4 import SMALLEST_DIVISOR

Shuffle = Literal["avx512", "avx2"]

NEEDED_FEATURES: dict[Shuffle, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
"""LLVM's names of what each needs, the best one first."""

GUESS = (-4.3935, 0.5644, 11.5123, 6.6778)
"""Cubic, highest power first: at threshold i it is within 0.21 of i. Rounded to an integer k, it says that a scaled
weight has the code k or k + 1, as long as the error stays below 0.5: float32 rounding (1e-6) has ample room."""
_ROUND_TO_INTEGER = 1.5 * 2**23
"""Added to a small float32, this leaves the nearest integer in the lowest bits."""

ENCODED_AT_ONCE = 64
"""Weights; the encoder takes a multiple of them, also for blocks of 32."""
_DECODED_AT_ONCE = 32

_BIT, _I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()


def cpu_features() -> frozenset[str]:
    """Return LLVM's names of the features that numba compiles for: those of this CPU, or of NUMBA_CPU_FEATURES."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


class Lanes:
    """A vector in the LLVM function under construction; each operator appends an instruction and gives its result."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder = builder
        self.value = value
        self.element: ir.Type = value.type.element
        self.count: int = value.type.count

    @classmethod
    def constant(cls, builder: ir.IRBuilder, element: ir.Type, numbers: Iterable[Any]) -> Lanes:
        """Return the given numbers as lanes."""
        plain = [float(number) if element == _F32 else int(number) for number in numbers]
        return cls(builder, ir.Constant(ir.VectorType(element, len(plain)), plain))

    @classmethod
    def repeat(cls, builder: ir.IRBuilder, scalar: Any, count: int) -> Lanes:
        """Return `count` lanes that all hold a scalar value."""
        undefined = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
        first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return cls(builder, first).pick([0] * count)

    def _of(self, value: Any) -> Lanes:
        return Lanes(self.builder, value)

    def _same(self, other: Lanes | float) -> Any:
        return other.value if isinstance(other, Lanes) else ir.Constant(self.value.type, [other] * self.count)

    def _vector(self, element: ir.Type) -> ir.VectorType:
        return ir.VectorType(element, self.count)

    def __add__(self, other: Lanes | float) -> Lanes:
        add = self.builder.fadd if self.element == _F32 else self.builder.add
        return self._of(add(self.value, self._same(other)))

    def __mul__(self, other: Lanes) -> Lanes:
        return self._of(self.builder.fmul(self.value, other.value))

    def __and__(self, other: int) -> Lanes:
        return self._of(self.builder.and_(self.value, self._same(other)))

    def __or__(self, other: Lanes | int) -> Lanes:
        return self._of(self.builder.or_(self.value, self._same(other)))

    def __lshift__(self, n_bits: int) -> Lanes:
        return self._of(self.builder.shl(self.value, self._same(n_bits)))

    def __rshift__(self, n_bits: int) -> Lanes:
        return self._of(self.builder.lshr(self.value, self._same(n_bits)))

    def __gt__(self, other: Lanes) -> Lanes:
        return self._of(self.builder.fcmp_ordered(">", self.value, other.value))

    def is_nan(self) -> Lanes:
        """Return one-bit lanes."""
        return self._of(self.builder.fcmp_unordered("uno", self.value, self.value))

    def has_bit(self, bit: int) -> Lanes:
        """Return one-bit lanes."""
        return self._of(self.builder.icmp_unsigned("!=", (self & (1 << bit)).value, self._same(0)))

    def choose(self, if_true: Lanes, if_false: Lanes) -> Lanes:
        """Return lanes of the one or the other; these are one-bit lanes."""
        return self._of(self.builder.select(self.value, if_true.value, if_false.value))

    def times_plus(self, factor: Lanes | float, summand: Lanes | float) -> Lanes:
        """Multiply and add with one rounding: for what need not equal the reference's bits."""
        arguments = (self.value, self._same(factor), self._same(summand))
        return self.call(f"llvm.fma.v{self.count}f32", self.value.type, *arguments)

    def widen(self, element: ir.Type) -> Lanes:
        """Return the unsigned integers with more bits."""
        return self._of(self.builder.zext(self.value, self._vector(element)))

    def cut(self, element: ir.Type) -> Lanes:
        """Return the lowest bits of each integer."""
        return self._of(self.builder.trunc(self.value, self._vector(element)))

    def to_half(self) -> Lanes:
        """Round float32 to float16, nearest even; return the bits."""
        return self._of(self.builder.fptrunc(self.value, self._vector(_F16))).reread(_I16)

    def from_half(self) -> Lanes:
        """Return the float32 values of float16 bits."""
        return self._of(self.builder.fpext(self.reread(_F16).value, self._vector(_F32)))

    def reread(self, element: ir.Type) -> Lanes:
        """Return the same bits as lanes of another type."""
        widths = {_F16: 16, _F32: 32}
        old, new = (widths.get(each) or each.width for each in (self.element, element))
        return self._of(self.builder.bitcast(self.value, ir.VectorType(element, self.count * old // new)))

    def pick(self, lanes: Sequence[int], other: Lanes | None = None) -> Lanes:
        """Return lanes by number; those of `other` are counted on after these."""
        second = ir.Constant(self.value.type, ir.Undefined) if other is None else other.value
        mask = ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))
        return self._of(self.builder.shuffle_vector(self.value, second, mask))

    def join(self, other: Lanes) -> Lanes:
        """Return these lanes and after them those of another vector."""
        return self.pick(range(2 * self.count), other)

    def call(self, name: str, returns: ir.Type, *arguments: Any) -> Lanes:
        """Call an LLVM intrinsic that returns a vector."""
        return self._of(_call(self.builder, name, returns, *arguments))


def _call(builder: ir.IRBuilder, name: str, returns: ir.Type, *arguments: Any) -> Any:
    signature = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


class _Memory:
    """A numba array argument as memory to load lanes from and store them to, aligned or not."""

    def __init__(self, context: Any, builder: ir.IRBuilder, array_type: types.Array, array: Any) -> None:
        self._builder = builder
        self._data = context.make_array(array_type)(context, builder, array).data

    def _pointer(self, index: Any, element: ir.Type, count: int) -> Any:
        return self._builder.bitcast(self._builder.gep(self._data, [index]), ir.VectorType(element, count).as_pointer())

    def load(self, index: Any, element: ir.Type, count: int) -> Lanes:
        loaded = self._builder.load(self._pointer(index, element, count))
        loaded.align = 1
        return Lanes(self._builder, loaded)

    def store(self, index: Any, lanes: Lanes) -> None:
        self._builder.store(lanes.value, self._pointer(index, lanes.element, lanes.count)).align = 1


def _look_up_floats(table: Lanes, index: Lanes, shuffle: Shuffle) -> Lanes:
    """Return table[index & 15] of a table of 16 floats; index is <16 x i32> with AVX-512, <8 x i32> with AVX2."""
    if shuffle == "avx512":
        return table.call("llvm.x86.avx512.permvar.sf.512", table.value.type, table.value, index.value)
    lower, upper = (
        half.call("llvm.x86.avx2.permps", half.value.type, half.value, index.value)
        for half in (table.pick(range(8)), table.pick(range(8, 16)))
    )
    return index.has_bit(3).choose(upper, lower)


def _look_up_shorts(table: Lanes, packed: Lanes, shuffle: Shuffle) -> Lanes:
    """Return the <32 x i16> of a table <16 x i16> that 16 packed bytes name, the high nibbles first."""
    if shuffle == "avx512":
        # vpermw reads 5 bits of an index, so the table stands there twice and the fifth bit may be anything.
        both = table.join(table)
        index = (packed.widen(_I32) >> 4 | packed.widen(_I32) << 16).reread(_I16)
        return both.call("llvm.x86.avx512.permvar.hi.512", both.value.type, both.value, index.value)
    # vpshufb finds bytes within each half of its register: both halves hold the table, one byte of each entry.
    index = (packed >> 4).pick([lane for i in range(16) for lane in (i, 16 + i)], packed & 15)
    first, second = (
        half.call("llvm.x86.avx2.pshuf.b", half.value.type, half.value, index.value)
        for half in (table.cut(_I8).pick([*range(16)] * 2), (table >> 8).cut(_I8).pick([*range(16)] * 2))
    )
    return first.pick([lane for i in range(32) for lane in (i, 32 + i)], second).reread(_I16)


def _widened(raw: Lanes, float_format: FloatFormat) -> Lanes:
    if float_format is FloatFormat.F32:
        return raw
    return raw.from_half() if float_format is FloatFormat.F16 else (raw.widen(_I32) << 16).reread(_F32)


def _narrowed(values: Lanes, float_format: FloatFormat) -> Lanes:
    """Round to nearest even, as `floats.narrow`; 16-bit formats as bits."""
    if float_format is FloatFormat.F32:
        return values
    if float_format is FloatFormat.F16:
        return values.to_half()
    bits = values.reread(_I32)
    rounded = (bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16
    return values.is_nan().choose(bits >> 16 | 0x40, rounded).cut(_I16)


def _steps(typed: Callable[..., Any]) -> Any:
    """Offer LLVM code to numba as a function; strings and numbers written out in a call reach it as literal types."""
    return intrinsic(prefer_literal=True)(typed)


def _raw_element(float_format: FloatFormat) -> ir.Type:
    return _F32 if float_format is FloatFormat.F32 else _I16


def _codes(scaled: Lanes, shuffle: Shuffle) -> Lanes:
    """Count the thresholds below each scaled weight: <i32>."""
    cubic, square, linear, constant = GUESS
    guess = Lanes.constant(scaled.builder, _F32, [cubic] * scaled.count)
    for coefficient in (square, linear, constant):
        guess = guess.times_plus(scaled, coefficient)
    index = (guess + _ROUND_TO_INTEGER).reread(_I32)
    thresholds = Lanes.constant(scaled.builder, _F32, [*NF4_THRESHOLDS, np.inf])
    above = scaled > _look_up_floats(thresholds, index, shuffle)
    return (index + above.widen(_I32)) & 15


@_steps
def _largest_magnitude(_: Any, raw: Any, start: Any, count: Any, float_format: Any) -> Any:
    """Return the largest magnitude of raw[start:start + count], as the bits of a float32; count is a literal."""
    source = FloatFormat(float_format.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = _I32 if source is FloatFormat.F32 else _I16
        n = count.literal_value
        loaded = _Memory(context, builder, signature.args[0], arguments[0]).load(arguments[1], integer, n)
        magnitudes = loaded & (0x7FFFFFFF if source is FloatFormat.F32 else 0x7FFF)
        largest = _call(builder, f"llvm.vector.reduce.umax.v{n}i{integer.width}", integer, magnitudes.value)
        if source is FloatFormat.F32:
            return largest
        if source is FloatFormat.F16:
            return builder.bitcast(builder.fpext(builder.bitcast(largest, _F16), _F32), _I32)
        return builder.shl(builder.zext(largest, _I32), ir.Constant(_I32, 16))

    return types.uint32(raw, start, count, float_format), generate


@_steps
def _as_float(_: Any, bits: Any) -> Any:
    """Return the float32 that uint32 bits mean."""
    return types.float32(bits), lambda _context, builder, _signature, arguments: builder.bitcast(arguments[0], _F32)


@_steps
def _encode_64(
    _: Any, raw: Any, start: Any, first_factor: Any, second_factor: Any, packed: Any, float_format: Any, shuffle: Any
) -> Any:
    """Encode raw[start:start + 64] into packed[start / 2:]; each half is multiplied by a reciprocal of its own."""
    source = FloatFormat(float_format.literal_value)
    count = 16 if shuffle.literal_value == "avx512" else 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = _Memory(context, builder, signature.args[0], arguments[0])
        factors = [Lanes.repeat(builder, factor, count) for factor in arguments[2:4]]
        parts = []
        for done in range(0, ENCODED_AT_ONCE, count):
            index = builder.add(arguments[1], ir.Constant(_I64, done))
            values = _widened(memory.load(index, _raw_element(source), count), source)
            parts.append(_codes(values * factors[2 * done // ENCODED_AT_ONCE], shuffle.literal_value))
        while len(parts) > 1:
            parts = [left.join(right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
        pairs = parts[0].cut(_I8).reread(_I16)  # little-endian: the first code of a pair is the low byte
        half_start = builder.lshr(arguments[1], ir.Constant(_I64, 1))
        _Memory(context, builder, signature.args[4], arguments[4]).store(half_start, (pairs << 4 | pairs >> 8).cut(_I8))
        return context.get_dummy_value()

    signature = types.void(raw, start, first_factor, second_factor, packed, float_format, shuffle)
    return signature, generate


@_steps
def _decode_block(
    _: Any, packed: Any, start: Any, size: Any, scale: Any, out: Any, float_format: Any, shuffle: Any
) -> Any:
    """Decode one block into out[start:start + size]."""
    target = FloatFormat(float_format.literal_value)
    instructions = shuffle.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes = _Memory(context, builder, signature.args[0], arguments[0])
        result = _Memory(context, builder, signature.args[4], arguments[4])
        _, start, size, scale, *_ = arguments
        products = Lanes.constant(builder, _F32, NF4_CODEBOOK) * Lanes.repeat(builder, scale, 16)
        table = _narrowed(products, target)
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), size, ir.Constant(_I64, _DECODED_AT_ONCE)) as (
            done,
            _count,
        ):
            index = builder.add(start, done)
            half_index = builder.lshr(index, ir.Constant(_I64, 1))
            if target is not FloatFormat.F32:
                result.store(index, _look_up_shorts(table, codes.load(half_index, _I8, 16), instructions))
            else:
                at_once = 16 if instructions == "avx512" else 8
                for part in range(0, _DECODED_AT_ONCE, at_once):
                    here = builder.add(half_index, ir.Constant(_I64, part // 2))
                    pairs = codes.load(here, _I8, at_once // 2).widen(_I64)
                    indices = (pairs >> 4 | pairs << 32).reread(_I32)
                    there = builder.add(index, ir.Constant(_I64, part))
                    result.store(there, _look_up_floats(table, indices, instructions))
        return context.get_dummy_value()

    return types.void(packed, start, size, scale, out, float_format, shuffle), generate


@jit
def _encode(raw: Any, block_size: Any, packed: Any, absmax: Any, float_format: Any, shuffle: Any) -> Any:
    """Encode whole blocks, a multiple of 64 weights; return whether all are finite."""
    largest_of_all = np.uint32(0)
    if block_size == 32:
        for pair in range(absmax.size // 2):
            start = 64 * pair
            first = _largest_magnitude(raw, start, 32, float_format)
            second = _largest_magnitude(raw, start + 32, 32, float_format)
            largest_of_all = max(largest_of_all, first, second)
            absmax[2 * pair] = _as_float(first)
            absmax[2 * pair + 1] = _as_float(second)
            first_factor = np.float32(1) / max(_as_float(first), SMALLEST_DIVISOR)
            second_factor = np.float32(1) / max(_as_float(second), SMALLEST_DIVISOR)
            _encode_64(raw, start, first_factor, second_factor, packed, float_format, shuffle)
    else:
        for block in range(absmax.size):
            largest = np.uint32(0)
            for start in range(block * block_size, (block + 1) * block_size, 64):
                largest = max(largest, _largest_magnitude(raw, start, 64, float_format))
            largest_of_all = max(largest_of_all, largest)
            absmax[block] = _as_float(largest)
            factor = np.float32(1) / max(_as_float(largest), SMALLEST_DIVISOR)
            for start in range(block * block_size, (block + 1) * block_size, 64):
                _encode_64(raw, start, factor, factor, packed, float_format, shuffle)
    return largest_of_all < F32_INFINITY


@jit
def _decode(packed: Any, scales: Any, block_size: Any, out: Any, float_format: Any, shuffle: Any) -> None:
    """Decode whole blocks."""
    for block in range(scales.size):
        _decode_block(packed, block * block_size, block_size, scales[block], out, float_format, shuffle)


def _variants(function: Any, signature: Callable[..., Any]) -> dict[tuple[Shuffle, FloatFormat], Kernel]:
    def variant(shuffle: Shuffle, float_format: FloatFormat) -> Kernel:
        element = types.float32 if float_format is FloatFormat.F32 else types.uint16
        return Kernel(function, signature(element, types.literal(float_format.value), types.literal(shuffle)))

    return {(shuffle, each): variant(shuffle, each) for shuffle in NEEDED_FEATURES for each in FloatFormat}


ENCODERS = _variants(_encode, encoder_signature)
DECODERS = _variants(_decode, decoder_signature)
