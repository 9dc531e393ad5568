"""Products as C functions, and the division of their rows among threads."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, types  # type: ignore[attr-defined]
from numba.extending import register_jitable

from qformat.codec.cpu.code_cache import cached_callback
from qformat.codec.cpu.lanes import I64, steps
from qformat.codec.cpu.product_rows import ProductInstructions, Weight, dot_row
from qformat.codec.floats import FloatFormat
from qformat.codec.nested import NESTED_BLOCK_SIZE


@register_jitable
def _deinterleave(x: Any, out: Any) -> None:
    """Copy x to `out` in groups of 64 elements, with the even elements of each group first."""
    for group in range(0, x.size, 64):
        for i in range(32):
            out[group + i] = x[group + 2 * i]
            out[group + 32 + i] = x[group + 2 * i + 1]


@steps
def _pointer_to(_: Any, address: Any, element: Any) -> Any:
    """Return a pointer to elements of a type from an address (int64)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element.dtype)(address, element), generate


class Job(ctypes.Structure):
    """Description of a product that all of its threads share: addresses, sizes, and the number of the next share."""

    _fields_ = (
        ("next_share", ctypes.c_int64),
        ("n_shares", ctypes.c_int64),
        ("x", ctypes.c_int64),
        ("x_size", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("packed", ctypes.c_int64),
        ("absmax", ctypes.c_int64),
        ("nested_absmax", ctypes.c_int64),
        ("nested_quant_map", ctypes.c_int64),
        ("n_rows", ctypes.c_int64),
        ("n_columns", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("offset", ctypes.c_float),
    )


_JOB_POINTER = types.CPointer(from_dtype(np.dtype(Job)))


@steps
def _take_share(_: Any, job: Any) -> Any:
    """Return the number of the next share of a job and increment it atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.ptrtoint(arguments[0], I64)
        counter = builder.add(start, ir.Constant(I64, Job.next_share.offset))
        return builder.atomic_rmw("add", builder.inttoptr(counter, I64.as_pointer()), ir.Constant(I64, 1), "monotonic")

    return types.int64(job), generate


@cache
def product_function(instructions: ProductInstructions, float_format: FloatFormat, *, double_quant: bool) -> Any:
    """Return a C function void(Job*) that computes a product. It has the attribute `address` and owns its code.

    Several threads may run it on the same job. Each thread repeatedly takes the next share of the rows of W. The first
    call for a variant on a machine compiles it (0.5 s); later calls load it from numba's cache.

    Args:
        instructions: Instructions to use.
        float_format: Float format of the weight, the rows and the result.
        double_quant: Whether the absmax values are quantized as well.
    """
    x_type = np.uint16 if instructions == "bf16" else np.float32
    out_type = np.float32 if float_format is FloatFormat.F32 else np.uint16
    absmax_type = np.uint8 if double_quant else np.float32
    levels = "two" if double_quant else "one"
    name, target = str(instructions), str(float_format.value)

    def run(address: Any) -> None:
        job = carray(address, (1,))[0]
        n_rows, n_columns, n_shares = job.n_rows, job.n_columns, job.n_shares
        n_blocks, m_rows = n_rows * n_columns // job.block_size, job.x_size // n_columns
        # Every thread makes its own copy, which is faster than waiting for another thread.
        x = np.empty(job.x_size, x_type)
        _deinterleave(carray(_pointer_to(job.x, x_type), (job.x_size,)), x)
        out = carray(_pointer_to(job.out, out_type), (m_rows * n_rows,))
        weight = Weight(
            carray(_pointer_to(job.packed, np.uint8), (n_rows * n_columns // 2,)),
            carray(_pointer_to(job.absmax, absmax_type), (n_blocks,)),
            carray(_pointer_to(job.nested_absmax, np.float32), (-(-n_blocks // NESTED_BLOCK_SIZE),)),
            carray(_pointer_to(job.nested_quant_map, np.float32), (256,)),
            job.offset,
            n_columns,
            job.block_size,
        )
        sums = np.empty(4, out_type)
        share = _take_share(address)
        while share < n_shares:
            for row in range(n_rows * share // n_shares, n_rows * (share + 1) // n_shares):
                m = 0
                while m + 4 <= m_rows:
                    dot_row(weight, row, x[m * n_columns :], 4, sums, levels, target, name)
                    for i in range(4):
                        out[(m + i) * n_rows + row] = sums[i]
                    m += 4
                while m < m_rows:
                    dot_row(weight, row, x[m * n_columns :], 1, sums, levels, target, name)
                    out[m * n_rows + row] = sums[0]
                    m += 1
            share = _take_share(address)

    return cached_callback(types.void(_JOB_POINTER), run)
