"""Vector operations that numba lacks, written as LLVM instructions: lanes, lookups in registers, rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from qformat.codec.floats import FloatFormat

Shuffle = Literal["avx512", "avx2"]

NEEDED_FEATURES: dict[Shuffle, frozenset[str]] = {
    "avx512": frozenset({"avx512f", "avx512bw"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
"""CPU features that each kind of instructions needs, by LLVM's names. The best kind is first."""

BIT, I8, I16, I32, I64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


@cache
def cpu_features() -> frozenset[str]:
    """Return the CPU features that numba compiles for, by LLVM's names: those of this CPU or of NUMBA_CPU_FEATURES."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


class Lanes:
    """Vector in an LLVM function under construction. Each operator appends an instruction and returns its result."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder = builder
        self.value = value
        self.element: ir.Type = value.type.element
        self.count: int = value.type.count

    @classmethod
    def constant(cls, builder: ir.IRBuilder, element: ir.Type, numbers: Iterable[Any]) -> Lanes:
        """Return constant lanes.

        Args:
            builder: Builder of the LLVM function.
            element: Type of a lane.
            numbers: Value of each lane.
        """
        plain = [float(number) if element == F32 else int(number) for number in numbers]
        return cls(builder, ir.Constant(ir.VectorType(element, len(plain)), plain))

    @classmethod
    def repeat(cls, builder: ir.IRBuilder, scalar: Any, count: int) -> Lanes:
        """Return lanes that all have the same value.

        Args:
            builder: Builder of the LLVM function.
            scalar: Value of the lanes.
            count: Number of lanes.
        """
        undefined = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
        first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return cls(builder, first).pick([0] * count)

    def _of(self, value: Any) -> Lanes:
        return Lanes(self.builder, value)

    def _same(self, other: Lanes | float) -> Any:
        return other.value if isinstance(other, Lanes) else ir.Constant(self.value.type, [other] * self.count)

    def _vector(self, element: ir.Type) -> ir.VectorType:
        return ir.VectorType(element, self.count)

    def __add__(self, other: Lanes | float) -> Lanes:
        add = self.builder.fadd if self.element == F32 else self.builder.add
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
        """Return one-bit lanes that are set for NaN."""
        return self._of(self.builder.fcmp_unordered("uno", self.value, self.value))

    def has_bit(self, bit: int) -> Lanes:
        """Return one-bit lanes that are set if a bit of the integer is set."""
        return self._of(self.builder.icmp_unsigned("!=", (self & (1 << bit)).value, self._same(0)))

    def choose(self, if_true: Lanes, if_false: Lanes) -> Lanes:
        """Select between two vectors by these one-bit lanes.

        Args:
            if_true: Lanes to return for bits that are set.
            if_false: Lanes to return for the others.
        """
        return self._of(self.builder.select(self.value, if_true.value, if_false.value))

    def times_plus(self, factor: Lanes | float, summand: Lanes | float) -> Lanes:
        """Multiply and add with a single rounding, for results that need not be bit-identical to the reference.

        Args:
            factor: Factor.
            summand: Summand.
        """
        arguments = (self.value, self._same(factor), self._same(summand))
        return self.call(f"llvm.fma.v{self.count}f32", self.value.type, *arguments)

    def widen(self, element: ir.Type) -> Lanes:
        """Extend unsigned integers to a wider type."""
        return self._of(self.builder.zext(self.value, self._vector(element)))

    def cut(self, element: ir.Type) -> Lanes:
        """Truncate integers to a narrower type."""
        return self._of(self.builder.trunc(self.value, self._vector(element)))

    def to_half(self) -> Lanes:
        """Round float32 to float16, ties to even, and return the bits."""
        return self._of(self.builder.fptrunc(self.value, self._vector(F16))).reread(I16)

    def from_half(self) -> Lanes:
        """Return the float32 values of float16 bits."""
        return self._of(self.builder.fpext(self.reread(F16).value, self._vector(F32)))

    def reread(self, element: ir.Type) -> Lanes:
        """Reinterpret the bits as lanes of another type."""
        widths = {F16: 16, F32: 32}
        old, new = (widths.get(each) or each.width for each in (self.element, element))
        return self._of(self.builder.bitcast(self.value, ir.VectorType(element, self.count * old // new)))

    def pick(self, lanes: Sequence[int], other: Lanes | None = None) -> Lanes:
        """Return selected lanes.

        Args:
            lanes: Numbers of the lanes.
            other: Second vector, whose lanes are numbered after those of this one.
        """
        second = ir.Constant(self.value.type, ir.Undefined) if other is None else other.value
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self._of(self.builder.shuffle_vector(self.value, second, mask))

    def join(self, other: Lanes) -> Lanes:
        """Concatenate these lanes and those of another vector."""
        return self.pick(range(2 * self.count), other)

    def call(self, name: str, returns: ir.Type, *arguments: Any) -> Lanes:
        """Call an LLVM intrinsic that returns a vector.

        Args:
            name: Name of the intrinsic.
            returns: Type of the result.
            arguments: LLVM values of the arguments.
        """
        return self._of(call(self.builder, name, returns, *arguments))


def call(builder: ir.IRBuilder, name: str, returns: ir.Type, *arguments: Any) -> Any:
    """Call an LLVM intrinsic and declare it on first use.

    Args:
        builder: Builder of the LLVM function.
        name: Name of the intrinsic.
        returns: Type of the result.
        arguments: LLVM values of the arguments.
    """
    signature = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


class Memory:
    """Memory of a numba array argument, for loading and storing lanes without alignment."""

    def __init__(self, context: Any, builder: ir.IRBuilder, array_type: types.Array, array: Any) -> None:
        self._builder = builder
        self._data = context.make_array(array_type)(context, builder, array).data

    def _pointer(self, index: Any, element: ir.Type, count: int) -> Any:
        return self._builder.bitcast(self._builder.gep(self._data, [index]), ir.VectorType(element, count).as_pointer())

    def load(self, index: Any, element: ir.Type, count: int) -> Lanes:
        """Load lanes from the array.

        Args:
            index: Index of the first element.
            element: Type of a lane.
            count: Number of lanes.
        """
        loaded = self._builder.load(self._pointer(index, element, count))
        loaded.align = 1
        return Lanes(self._builder, loaded)

    def prefetch(self, index: Any) -> None:
        """Prefetch the cache line at an index, which may be past the end."""
        pointer = self._builder.bitcast(self._builder.gep(self._data, [index]), ir.IntType(8).as_pointer())
        flags = [ir.Constant(I32, flag) for flag in (0, 3, 1)]  # for reading, into all cache levels, data
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(self._builder.module, signature, "llvm.prefetch.p0")
        self._builder.call(function, [pointer, *flags])

    def store(self, index: Any, lanes: Lanes) -> None:
        """Store lanes in the array.

        Args:
            index: Index of the first element.
            lanes: Lanes to store.
        """
        self._builder.store(lanes.value, self._pointer(index, lanes.element, lanes.count)).align = 1


def look_up_floats(table: Lanes, index: Lanes, shuffle: Shuffle) -> Lanes:
    """Look up floats in a table.

    Args:
        table: Table, <16 x float>.
        index: Indices, <16 x i32> with AVX-512 and <8 x i32> with AVX2. Only their lower 4 bits count.
        shuffle: Instructions to use.
    """
    if shuffle == "avx512":
        return table.call("llvm.x86.avx512.permvar.sf.512", table.value.type, table.value, index.value)
    lower, upper = (
        half.call("llvm.x86.avx2.permps", half.value.type, half.value, index.value)
        for half in (table.pick(range(8)), table.pick(range(8, 16)))
    )
    return index.has_bit(3).choose(upper, lower)


def look_up_shorts(table: Lanes, packed: Lanes, shuffle: Shuffle) -> Lanes:
    """Look up the entries of 32 packed codes in a table of 16-bit values.

    Args:
        table: Table, <16 x i16>.
        packed: Packed codes, <16 x i8>, the first of a pair in the high nibble.
        shuffle: Instructions to use.

    Returns:
        The entries in the order of the codes, <32 x i16>.
    """
    if shuffle == "avx512":
        # vpermw uses 5 bits of an index. The table is doubled, so that the fifth bit does not matter.
        both = table.join(table)
        index = (packed.widen(I32) >> 4 | packed.widen(I32) << 16).reread(I16)
        return both.call("llvm.x86.avx512.permvar.hi.512", both.value.type, both.value, index.value)
    # vpshufb looks up bytes within each half of its register. Both halves contain the table, one byte of each entry.
    index = (packed >> 4).pick([lane for i in range(16) for lane in (i, 16 + i)], packed & 15)
    first, second = (
        half.call("llvm.x86.avx2.pshuf.b", half.value.type, half.value, index.value)
        for half in (table.cut(I8).pick([*range(16)] * 2), (table >> 8).cut(I8).pick([*range(16)] * 2))
    )
    return first.pick([lane for i in range(32) for lane in (i, 32 + i)], second).reread(I16)


def widened(raw: Lanes, float_format: FloatFormat) -> Lanes:
    """Convert raw lanes to float32.

    Args:
        raw: Raw lanes.
        float_format: Float format of the lanes.
    """
    if float_format is FloatFormat.F32:
        return raw
    return raw.from_half() if float_format is FloatFormat.F16 else (raw.widen(I32) << 16).reread(F32)


def narrowed(values: Lanes, float_format: FloatFormat) -> Lanes:
    """Round float32 lanes to raw lanes, bit-identical to `floats.narrow`.

    Args:
        values: Lanes of float32.
        float_format: Float format of the result. 16-bit formats are returned as bits.
    """
    if float_format is FloatFormat.F32:
        return values
    if float_format is FloatFormat.F16:
        return values.to_half()
    bits = values.reread(I32)
    rounded = (bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16
    return values.is_nan().choose(bits >> 16 | 0x40, rounded).cut(I16)


def steps(typed: Callable[..., Any]) -> Any:
    """Return LLVM code as a numba function. String and number literals in a call arrive as literal types."""
    return intrinsic(prefer_literal=True)(typed)


@steps
def as_bits(_: Any, value: Any) -> Any:
    """Return the bits of a float32 as uint32."""
    return types.uint32(value), lambda _context, builder, _signature, arguments: builder.bitcast(arguments[0], I32)


@steps
def as_float(_: Any, bits: Any) -> Any:
    """Return the float32 with the bits of a uint32."""
    return types.float32(bits), lambda _context, builder, _signature, arguments: builder.bitcast(arguments[0], F32)
