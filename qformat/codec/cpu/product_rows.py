"""Products of a few rows with a packed weight, computed from the codes. Decoded weights exist only in registers.

A row of W is processed in groups of 64 weights (32 bytes):

    packed     | w0:w1 | w2:w3 | w4:w5 | ...                | w62:w63 |     high:low nibble of each byte
                  |  '------ low nibbles:  w1 w3 w5 ... w63
                  '--------- high nibbles: w0 w2 w4 ... w62
    x, copied  | x0 x2 x4 ... x62 | x1 x3 x5 ... x63 |                      even elements first in each group

    table      | c0*s  c1*s ... c15*s |        the 16 possible values of a block with scale s, rounded to the format
    weights  = table[nibbles]                  one shuffle instruction for 16 or 32 weights
    sums    += weights * x

High nibbles are even elements and low nibbles are odd elements. With the even elements of x first, no nibble has to
move. The products are computed by:

- "bf16": `vdpbf16ps`, 32 products of bfloat16 at a time (AVX512-BF16). It treats subnormal numbers as zero.
- "avx512", "avx2": fused multiply-adds in float32.

Sums are float32, in an order that depends only on K, so threads can share the rows in any way.
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
"""CPU features that each kind of instructions needs, by LLVM's names. The best kind is first."""

GROUP = 64
"""Number of weights of a row that are processed together. K is a multiple of it."""


PREFETCH_NBYTES = 1024
"""Distance of prefetching in bytes of codes: 16 instead of 10 G weights/s for codes in memory. The hardware also
prefetches, but stops at the end of each 4 KiB page."""


class _BFloat(ir.Type):
    """LLVM's type bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _as_bfloats(lanes: Lanes) -> Any:
    """Reinterpret <32 x i16> as <32 x bfloat>."""
    return lanes.builder.bitcast(lanes.value, ir.VectorType(_BFloat(), 32))


def _as_bits(floats: Lanes) -> Lanes:
    """Round 16 lanes to bfloat16 in one instruction. Unlike in `narrowed`, subnormal numbers become zero."""
    rounded = floats.call("llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(_BFloat(), 16), floats.value)
    return Lanes(floats.builder, floats.builder.bitcast(rounded.value, ir.VectorType(I16, 16)))


def _sum(lanes: Lanes) -> Lanes:
    """Return one lane with the sum of all, added pairwise."""
    while lanes.count > 1:
        half = lanes.count // 2
        lanes = lanes.pick(range(half)) + lanes.pick(range(half, lanes.count))
    return lanes


class Weight(NamedTuple):
    """Arguments of the kernels that describe a packed weight.

    Attributes:
        packed: Packed codes, uint8 [N * K / 2].
        absmax: Scales, float32 [N * K / block_size]; with double quantization codes, uint8.
        nested_absmax: Nested absmax values, float32.
        nested_quant_map: Codebook of the absmax values, float32 [256].
        offset: Mean of the absmax values.
        n_columns: K.
        block_size: Number of elements per block.
    """

    packed: Any
    absmax: Any
    nested_absmax: Any
    nested_quant_map: Any
    offset: Any
    n_columns: Any
    block_size: Any


@dataclass(frozen=True, slots=True)
class _Variant:
    """Properties of a product that are fixed at compile time; `n_x` is the number of rows of x."""

    float_format: FloatFormat
    instructions: ProductInstructions
    double_quant: bool
    n_x: int

    @property
    def count(self) -> int:
        """Number of float32 lanes in a register."""
        return 8 if self.instructions == "avx2" else 16

    @property
    def shuffle(self) -> Shuffle:
        """Instructions for looking up floats in a table."""
        return "avx2" if self.instructions == "avx2" else "avx512"


class _RowProduct:
    """Generates the LLVM code of one row of W times some rows of x. LLVM values are i64 unless noted otherwise."""

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
        # Block sizes are powers of two: a shift replaces a division that would take as long as the rest of a block.
        self._block_shift = builder.cttz(self._weight.block_size, ir.Constant(ir.IntType(1), 1))
        zero = ir.Constant(ir.VectorType(F32, variant.count), [0.0] * variant.count)
        self._totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * variant.n_x)]

    def add_row(self, row: Any) -> None:
        """Add the products of a row of W, one group at a time."""
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
        """Return the sum for each row of x, rounded to a raw element."""
        found = []
        for m in range(self._variant.n_x):
            even, odd = (Lanes(self._builder, self._builder.load(total)) for total in self._totals[2 * m : 2 * m + 2])
            total = narrowed(_sum(even + odd), self._variant.float_format)
            found.append(self._builder.extract_element(total.value, ir.Constant(I32, 0)))
        return found

    def _scale_of(self, element: Any) -> Any:
        """Return the decoded scale (a float) of the block that contains an element of W."""
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
        """Return the 16 possible values of an element's block as raw lanes, rounded as in decoding."""
        scale = Lanes.repeat(self._builder, self._scale_of(element), 16)
        products = Lanes.constant(self._builder, F32, NF4_CODEBOOK) * scale
        if self._variant.instructions == "bf16":
            return _as_bits(products)
        return narrowed(products, self._variant.float_format)

    def _x_index(self, group: Any, m: int, offset: int) -> Any:
        """Return the index of an element of a group in row `m` of x."""
        at = self._builder.add(group, self._builder.mul(ir.Constant(I64, m), self._weight.n_columns))
        return self._builder.add(at, ir.Constant(I64, offset))

    def _add_group_bf16(self, group: Any, code_index: Any, tables: tuple[Lanes, Lanes]) -> None:
        """Add the products of 64 weights, 32 products at a time. Each half of the group has a table."""
        builder = self._builder
        both = tables[0].join(tables[1])
        low = self._codes.load(code_index, I8, 32).widen(I16)
        high = low >> 4
        if tables[0] is not tables[1]:  # blocks of 32: the second half uses the second table
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
        """Add the products of 64 weights, one register of them at a time. Each half of the group has a table."""
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
    """Compute the products of one row of W with rows of x, rounded to the float format.

    Args:
        weight: `Weight`.
        row: Index of the row of W.
        x: Rows of x, flat, with the even elements of each group of 64 first.
        n_x: Number of rows of x, a literal.
        sums: Array for the products, raw elements [n_x].
        levels: Literal "two" with double quantization, otherwise "one".
        float_format: Literal name of the float format.
        instructions: Literal name of the instructions.
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
