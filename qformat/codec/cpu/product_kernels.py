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

from enum import IntEnum
from functools import cache
from typing import Any, Literal

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import register_jitable

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
    as_float,
    look_up_floats,
    narrowed,
    steps,
    widened,
)
from qformat.codec.floats import FloatFormat

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


def _scalar(builder: ir.IRBuilder, context: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.load(builder.gep(data, [index]))


def _sum(lanes: Lanes) -> Lanes:
    """Return one lane: the sum of all, in a tree."""
    while lanes.count > 1:
        half = lanes.count // 2
        lanes = lanes.pick(range(half)) + lanes.pick(range(half, lanes.count))
    return lanes


@steps
def _dot_row(
    _: Any, x: Any, packed: Any, absmax: Any, nested_absmax: Any, nested_quant_map: Any, offset: Any, row: Any,
    columns: Any, block_size: Any, sums: Any, n_x_rows: Any, levels: Any, float_format: Any, instructions: Any,
) -> Any:  # fmt: skip
    """sums[m] = row `row` of W times x[m * columns:], rounded to the format; m < n_x_rows (a literal), x deinterleaved.

    levels, a literal: "two" if absmax holds codes of the second level, "one" if it is float32.
    """
    target = FloatFormat(float_format.literal_value)
    mode = instructions.literal_value
    count = 8 if mode == "avx2" else 16
    shuffle: Shuffle = "avx2" if mode == "avx2" else "avx512"
    n_x = n_x_rows.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        xs = Memory(context, builder, kinds[0], arguments[0])
        codes = Memory(context, builder, kinds[1], arguments[1])
        _, _, _, _, _, offset, row, columns, block_size, *_ = arguments
        zero = ir.Constant(ir.VectorType(F32, count), [0.0] * count)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * n_x)]
        row_start = builder.mul(row, columns)
        # Block sizes are powers of two, and a division takes as long as all the rest of a block.
        block_shift = builder.cttz(block_size, ir.Constant(ir.IntType(1), 1))

        def scale_of(element: Any) -> Any:
            block = builder.lshr(element, block_shift)
            value = _scalar(builder, context, kinds[2], arguments[2], block)
            if levels.literal_value == "one":
                return value
            nested = _scalar(builder, context, kinds[3], arguments[3], builder.lshr(block, ir.Constant(I64, 8)))
            entry = _scalar(builder, context, kinds[4], arguments[4], builder.zext(value, I64))
            return builder.fadd(builder.fmul(entry, nested), offset)

        def table_of(element: Any) -> Lanes:
            products = Lanes.constant(builder, F32, NF4_CODEBOOK) * Lanes.repeat(builder, scale_of(element), 16)
            return _as_bits(products) if mode == "bf16" else narrowed(products, target)

        def add(total: int, add_to: Any) -> None:
            builder.store(add_to(builder.load(totals[total])), totals[total])

        def add_group_bf16(group: Any, code_index: Any, tables: tuple[Lanes, Lanes]) -> None:
            both = tables[0].join(tables[1])
            low = codes.load(code_index, I8, 32).widen(I16)
            high = low >> 4
            if tables[0] is not tables[1]:  # blocks of 32: the upper half looks up in the second table
                second_half = Lanes.constant(builder, I16, [0] * 16 + [16] * 16)
                low, high = (low & 15) | second_half, high | second_half
            for parity, index in enumerate((high, low)):
                weights = both.call("llvm.x86.avx512.permvar.hi.512", both.value.type, both.value, index.value)
                for m in range(n_x):
                    at = builder.add(group, builder.mul(ir.Constant(I64, m), columns))
                    values = xs.load(builder.add(at, ir.Constant(I64, 32 * parity)), I16, 32)
                    operands = (_as_bfloats(weights), _as_bfloats(values))
                    add(
                        2 * m + parity,
                        lambda total, operands=operands: (
                            Lanes(builder, total)
                            .call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, *operands)
                            .value
                        ),
                    )

        def add_group_float(group: Any, code_index: Any, tables: tuple[Lanes, Lanes]) -> None:
            floats = tuple(widened(table, target) for table in tables)
            for part in range(32 // count):
                table = floats[part * count // 16]
                at_part = ir.Constant(I64, part * count)
                pairs = codes.load(builder.add(code_index, at_part), I8, count).widen(I32)
                for parity, index in enumerate((pairs >> 4, pairs & 15)):
                    weights = look_up_floats(table, index, shuffle)
                    for m in range(n_x):
                        at = builder.add(group, builder.mul(ir.Constant(I64, m), columns))
                        at = builder.add(builder.add(at, at_part), ir.Constant(I64, 32 * parity))
                        values = xs.load(at, F32, count)
                        add(
                            2 * m + parity,
                            lambda total, w=weights, v=values: w.times_plus(v, Lanes(builder, total)).value,
                        )

        add_group = add_group_bf16 if mode == "bf16" else add_group_float
        small_blocks = builder.icmp_unsigned("==", block_size, ir.Constant(I64, 32))
        with cgutils.for_range_slice(builder, ir.Constant(I64, 0), columns, ir.Constant(I64, GROUP)) as (group, _n):
            element = builder.add(row_start, group)
            code_index = builder.lshr(element, ir.Constant(I64, 1))
            codes.prefetch(builder.add(code_index, ir.Constant(I64, PREFETCH_NBYTES)))
            with builder.if_else(small_blocks) as (if_small, if_large):
                with if_small:
                    second = table_of(builder.add(element, ir.Constant(I64, 32)))
                    add_group(group, code_index, (table_of(element), second))
                with if_large:
                    table = table_of(element)
                    add_group(group, code_index, (table, table))
        data = context.make_array(kinds[9])(context, builder, arguments[9]).data
        for m in range(n_x):
            even, odd = (Lanes(builder, builder.load(totals[2 * m + parity])) for parity in (0, 1))
            total = narrowed(_sum(even + odd), target)
            raw = builder.extract_element(total.value, ir.Constant(I32, 0))
            builder.store(raw, builder.gep(data, [ir.Constant(I64, m)]))
        return context.get_dummy_value()

    signature = types.void(
        x, packed, absmax, nested_absmax, nested_quant_map, offset, row, columns, block_size, sums, n_x_rows, levels,
        float_format, instructions,
    )  # fmt: skip
    return signature, generate


@register_jitable
def _deinterleave(x: Any, out: Any) -> None:
    """Write x to `out` in groups of 64, each with its even elements first."""
    for group in range(0, x.size, 64):
        for i in range(32):
            out[group + i] = x[group + 2 * i]
            out[group + 32 + i] = x[group + 2 * i + 1]


@steps
def _pointer_to(_: Any, address: Any, element: Any) -> Any:
    """Return an address (int64) as a pointer to elements of a type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element.dtype)(address, element), generate


@steps
def _next(_: Any, counter: Any) -> Any:
    """Return the int64 that a pointer points to, and add one to it, both at once for all threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(I64, 1), "monotonic")

    return types.int64(counter), generate


class Field(IntEnum):
    """The fields of a job, int64 each: addresses of arrays, and sizes. offset_bits: those of the float32."""

    NEXT_SHARE = 0
    N_SHARES = 1
    X = 2
    X_SIZE = 3
    OUT = 4
    PACKED = 5
    ABSMAX = 6
    NESTED_ABSMAX = 7
    NESTED_QUANT_MAP = 8
    OFFSET_BITS = 9
    N_ROWS = 10
    N_COLUMNS = 11
    BLOCK_SIZE = 12


N_FIELDS = len(Field)


@cache
def product_function(instructions: ProductInstructions, float_format: FloatFormat, *, double_quant: bool) -> int:
    """Return the address of a C function void(int64 job[N_FIELDS]): the product that a job describes.

    Any number of threads may run it at once on one job: each takes the next share of W's rows until none is left.
    Compiled when first asked for (0.5 s), then loaded from numba's cache.
    """
    x_type = np.uint16 if instructions == "bf16" else np.float32
    out_type = np.float32 if float_format is FloatFormat.F32 else np.uint16
    absmax_type = np.uint8 if double_quant else np.float32
    levels = "two" if double_quant else "one"
    name, target = str(instructions), str(float_format.value)

    def run(job: Any) -> None:
        fields = carray(job, (13,))
        n_shares, x_size, n_rows, columns, block_size = fields[1], fields[3], fields[10], fields[11], fields[12]
        n_blocks, m_rows = n_rows * columns // block_size, x_size // columns
        # Every thread for itself: it takes less time than waiting for another.
        x = np.empty(x_size, x_type)
        _deinterleave(carray(_pointer_to(fields[2], x_type), (x_size,)), x)
        out = carray(_pointer_to(fields[4], out_type), (m_rows * n_rows,))
        packed = carray(_pointer_to(fields[5], np.uint8), (n_rows * columns // 2,))
        absmax = carray(_pointer_to(fields[6], absmax_type), (n_blocks,))
        nested = carray(_pointer_to(fields[7], np.float32), ((n_blocks + 255) // 256,))
        nested_map = carray(_pointer_to(fields[8], np.float32), (256,))
        offset = as_float(np.uint32(fields[9]))
        sums = np.empty(4, out_type)
        share = _next(job)
        while share < n_shares:
            for row in range(n_rows * share // n_shares, n_rows * (share + 1) // n_shares):
                m = 0
                while m + 4 <= m_rows:
                    _dot_row(
                        x[m * columns :], packed, absmax, nested, nested_map, offset, row, columns, block_size,
                        sums, 4, levels, target, name,
                    )  # fmt: skip
                    for i in range(4):
                        out[(m + i) * n_rows + row] = sums[i]
                    m += 4
                while m < m_rows:
                    _dot_row(
                        x[m * columns :], packed, absmax, nested, nested_map, offset, row, columns, block_size,
                        sums, 1, levels, target, name,
                    )  # fmt: skip
                    out[m * n_rows + row] = sums[0]
                    m += 1
            share = _next(job)

    signature = types.void(types.CPointer(types.int64))
    try:
        compiled = cfunc(signature, cache=True, error_model="numpy")(run)
    except RuntimeError:  # no folder for the cache can be written
        compiled = cfunc(signature, error_model="numpy")(run)
    _compiled.append(compiled)
    return compiled.address  # type: ignore[return-value]


_compiled: list[Any] = []
"""What owns the machine code."""
