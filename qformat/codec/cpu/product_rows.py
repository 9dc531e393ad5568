"""Products of a few rows with packed weights, straight from the codes: the decoded weight never leaves the registers.

A row of W is read 64 weights (32 bytes) at a time. The high nibbles are the even elements and the low ones the odd
ones, so x lies there with its even elements first in each group of 64 (`deinterleave`), and no nibble has to be moved.
A table of the block's 16 products, rounded as the decoder rounds them, is looked up by the codes, one shuffle for 16 or
32 weights, and multiplied with x:

- "bf16": `vdpbf16ps`, 32 products of bf16 at a time (AVX512-BF16). It takes subnormal numbers for zero.
- "avx512", "avx2": fused multiply-adds in float32.

Sums are float32 in an order that depends on nothing but K, so rows can be shared among threads in any way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from qformat.codec.codebooks import NF4_CODEBOOK
from qformat.codec.cpu.lanes import (
    F32,
    I8,
    I16,
    I32,
    I64,
    Lanes,
    Memory,
    Shuffle,
    look_up_floats,
    narrowed,
    steps,
    widened,
)
from qformat.codec.floats import FloatFormat
from qformat.codec.nested import NESTED_BLOCK_SIZE

ProductInstructions = Literal["bf16", "avx512", "avx2"]

NEEDED_FEATURES: dict[ProductInstructions, frozenset[str]] = {
    "bf16": frozenset({"avx512f", "avx512bw", "avx512bf16"}),
    "avx512": frozenset({"avx512f", "avx512bw"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
"""LLVM's names of what each needs, the best one first."""

GROUP = 64
"""Weights of a row that are taken together; K is a multiple of it."""


PREFETCH_NBYTES = 1024
"""How far ahead codes are asked for: 16 instead of 10 G weights/s where they come from memory. The hardware looks
ahead, too, but stops at the end of each 4 KB page."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _as_bfloats(lanes: Lanes) -> Any:
    """Return <32 x i16> as <32 x bfloat>."""
    return lanes.builder.bitcast(lanes.value, ir.VectorType(_BFloat(), 32))


def _as_bits(floats: Lanes) -> Lanes:
    """Round 16 lanes to bfloat16 in one instruction: `narrowed`, but for subnormal numbers, which become zero."""
    rounded = floats.call("llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFloat(), 16), floats.value)
    return Lanes(floats.builder, floats.builder.bitcast(rounded.value, ir.VectorType(I16, 16)))


def _sum(lanes: Lanes) -> Lanes:
    """Return one lane: the sum of all, in a tree."""
    while lanes.count > 1:
        half = lanes.count // 2
        lanes = lanes.pick(range(half)) + lanes.pick(range(half, lanes.count))
    return lanes


class Weight(NamedTuple):
    """A packed weight as the kernels see it: arrays, the second level's offset, and sizes."""

    packed: Any
    absmax: Any
    nested_absmax: Any
    nested_quant_map: Any
    offset: Any
    n_columns: Any
    block_size: Any


@dataclass(frozen=True, slots=True)
class _Variant:
    """What of a product is fixed when it is compiled. n_x: rows of x; double_quant: absmax holds codes."""

    float_format: FloatFormat
    instructions: ProductInstructions
    double_quant: bool
    n_x: int

    @property
    def count(self) -> int:
        """Lanes of float32 in a register."""
        return 8 if self.instructions == "avx2" else 16

    @property
    def shuffle(self) -> Shuffle:
        """The instructions that look up a table of floats."""
        return "avx2" if self.instructions == "avx2" else "avx512"


class _RowProduct:
    """The LLVM code of one row of W times some rows of x. Values of LLVM are i64 unless they say otherwise."""

    def __init__(
        self, context: Any, builder: ir.IRBuilder, variant: _Variant, weight_type: Any, weight: Any, x: Memory
    ) -> None:
        self._context = context
        self._builder = builder
        self._variant = variant
        self._types = Weight(*weight_type.types)
        self._weight = Weight(*(builder.extract_value(weight, i) for i in range(len(Weight._fields))))
        self._x = x
        self._codes = Memory(context, builder, self._types.packed, self._weight.packed)
        # Block sizes are powers of two, and a division takes as long as all the rest of a block.
        self._block_shift = builder.cttz(self._weight.block_size, ir.Constant(ir.IntType(1), 1))
        zero = ir.Constant(ir.VectorType(F32, variant.count), [0.0] * variant.count)
        self._totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * variant.n_x)]

    def add_row(self, row: Any) -> None:
        """Add all products of a row of W, a group at a time."""
        builder, n_columns = self._builder, self._weight.n_columns
        row_start = builder.mul(row, n_columns)
        small_blocks = builder.icmp_unsigned("==", self._weight.block_size, ir.Constant(I64, 32))
        add_group = self._add_group_bf16 if self._variant.instructions == "bf16" else self._add_group_float
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n_columns, ir.Constant(I64, GROUP)) as (group, _n):
            element = builder.add(row_start, group)
            code_index = builder.lshr(element, ir.Constant(I64, 1))
            self._codes.prefetch(builder.add(code_index, ir.Constant(I64, PREFETCH_NBYTES)))
            with builder.if_else(small_blocks) as (if_small, if_large):
                with if_small:
                    second = self._table_of(builder.add(element, ir.Constant(I64, 32)))
                    add_group(group, code_index, (self._table_of(element), second))
                with if_large:
                    table = self._table_of(element)
                    add_group(group, code_index, (table, table))

    def sums(self) -> list[Any]:
        """Return the raw element of each row of x: its sum, rounded to the format."""
        found = []
        for m in range(self._variant.n_x):
            even, odd = (Lanes(self._builder, self._builder.load(total)) for total in self._totals[2 * m : 2 * m + 2])
            total = narrowed(_sum(even + odd), self._variant.float_format)
            found.append(self._builder.extract_element(total.value, ir.Constant(I32, 0)))
        return found

    def _scale_of(self, element: Any) -> Any:
        """Return the decoded scale, a float, of the block that holds an element of W."""
        builder = self._builder
        block = builder.lshr(element, self._block_shift)
        value = self._entry("absmax", block)
        if not self._variant.double_quant:
            return value
        group = builder.lshr(block, ir.Constant(I64, NESTED_BLOCK_SIZE.bit_length() - 1))
        entry = self._entry("nested_quant_map", builder.zext(value, I64))
        return builder.fadd(builder.fmul(entry, self._entry("nested_absmax", group)), self._weight.offset)

    def _entry(self, name: str, index: Any) -> Any:
        array = self._context.make_array(getattr(self._types, name))(
            self._context, self._builder, getattr(self._weight, name)
        )
        return self._builder.load(self._builder.gep(array.data, [index]))

    def _table_of(self, element: Any) -> Lanes:
        """Return what the 16 codes of an element's block mean, rounded as the decoder rounds: raw lanes."""
        scale = Lanes.repeat(self._builder, self._scale_of(element), 16)
        products = Lanes.constant(self._builder, F32, NF4_CODEBOOK) * scale
        if self._variant.instructions == "bf16":
            return _as_bits(products)
        return narrowed(products, self._variant.float_format)

    def _x_index(self, group: Any, m: int, offset: int) -> Any:
        """Return where in row `m` of x an element of a group lies."""
        at = self._builder.add(group, self._builder.mul(ir.Constant(I64, m), self._weight.n_columns))
        return self._builder.add(at, ir.Constant(I64, offset))

    def _add_group_bf16(self, group: Any, code_index: Any, tables: tuple[Lanes, Lanes]) -> None:
        """Add the products of 64 weights with the tables of each half, 32 products at a time."""
        builder = self._builder
        both = tables[0].join(tables[1])
        low = self._codes.load(code_index, I8, 32).widen(I16)
        high = low >> 4
        if tables[0] is not tables[1]:  # blocks of 32: the upper half looks up in the second table
            second_half = Lanes.constant(builder, I16, [0] * 16 + [16] * 16)
            low, high = (low & 15) | second_half, high | second_half
        for parity, index in enumerate((high, low)):
            weights = both.call("llvm.x86.avx512.permvar.hi.512", both.value.type, both.value, index.value)
            for m in range(self._variant.n_x):
                values = self._x.load(self._x_index(group, m, 32 * parity), I16, 32)
                place = self._totals[2 * m + parity]
                total = Lanes(builder, builder.load(place))
                operands = (total.value, _as_bfloats(weights), _as_bfloats(values))
                added = total.call("llvm.x86.avx512bf16.dpbf16ps.512", total.value.type, *operands)
                builder.store(added.value, place)

    def _add_group_float(self, group: Any, code_index: Any, tables: tuple[Lanes, Lanes]) -> None:
        """Add the products of 64 weights with the tables of each half, a register of them at a time."""
        builder, count = self._builder, self._variant.count
        floats = tuple(widened(table, self._variant.float_format) for table in tables)
        for part in range(32 // count):
            table = floats[part * count // 16]
            pairs = self._codes.load(builder.add(code_index, ir.Constant(I64, part * count)), I8, count).widen(I32)
            for parity, index in enumerate((pairs >> 4, pairs & 15)):
                weights = look_up_floats(table, index, self._variant.shuffle)
                for m in range(self._variant.n_x):
                    values = self._x.load(self._x_index(group, m, 32 * parity + part * count), F32, count)
                    place = self._totals[2 * m + parity]
                    builder.store(weights.times_plus(values, Lanes(builder, builder.load(place))).value, place)


@steps
def dot_row(
    _: Any, weight: Any, row: Any, x: Any, n_x: Any, sums: Any, levels: Any, float_format: Any, instructions: Any
) -> Any:
    """sums[m] = row `row` of W times x[m * n_columns:], rounded to the format; m < n_x (a literal), x deinterleaved.

    levels, a literal: "two" if absmax holds codes of the second level, "one" if it is float32.
    """
    variant = _Variant(
        FloatFormat(float_format.literal_value),
        instructions.literal_value,
        levels.literal_value == "two",
        n_x.literal_value,
    )

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weight_type, _row, x_type, _n_x, sums_type, *_literals = signature.args
        memory = Memory(context, builder, x_type, arguments[2])
        product = _RowProduct(context, builder, variant, weight_type, arguments[0], memory)
        product.add_row(arguments[1])
        data = context.make_array(sums_type)(context, builder, arguments[4]).data
        for m, raw in enumerate(product.sums()):
            builder.store(raw, builder.gep(data, [ir.Constant(I64, m)]))
        return context.get_dummy_value()

    return types.void(weight, row, x, n_x, sums, levels, float_format, instructions), generate
