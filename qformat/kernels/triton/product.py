"""The product of a few rows with a 4-bit weight on a GPU, for decoding: out = x W^T without a 16-bit W in memory.

W is, bit for bit, what `dequantize` gives (the sign of zeros aside); sums are float32, in an order that depends
on shapes and device only, so every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import UsageError
from qformat.kernels.few_rows import MAX_ROWS_FROM_CODES
from qformat.kernels.packed_weight import PackedWeight
from qformat.kernels.triton.launch import check_aligned, check_tensors, multiprocessors, on_device

SEGMENT = 64
"""Columns must be a multiple of this: a lane decodes 64 weights of one row."""

STEP = 256
"""Columns of one loop step."""

MAX_ELEMENTS = 2**34
"""The kernel counts words of 8 weights in int32."""

DTYPES = (torch.bfloat16, torch.float16)

PROGRAMS_PER_MULTIPROCESSOR = 8
"""How many programs a multiprocessor should get before K is no longer split: with 80-96 registers and 64 threads, 10 of
32 rows reside at once. Reasoned, not yet timed: `python -m tools.gpu.check` measures the alternatives."""

MIN_STEPS_PER_SPLIT = 2
"""A split with one step has nothing to prefetch."""

SUM_BLOCK = 512
SUM_OPTIONS: dict[str, Any] = {"BLOCK": SUM_BLOCK, "num_warps": 4}


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How to launch the product of one shape.

    batch: columns of the tensor-core operand that holds x, 8 or 16; rows: of the weight, a program; splits: of K.
    """

    batch: int
    rows: int
    splits: int
    n_warps: int = 2
    n_stages: int = 3


# Instructions a weight in the K loop, registers, shared memory (sm_90, three stages, block 64, second level):
#     batch  8, rows 32: 4.22, 80, 18 KB    rows 64: 4.02, 128, 28 KB
#     batch 16, rows 32: 4.70, 106, 26 KB   rows 64: 4.44, 176, 36 KB
# For m <= 8, 32 rows: twice the programs for small N and 20 warps a multiprocessor cost 0.2 instructions. For m > 8, 64
# rows: a program reads 8 KB of x a step, as much as 64 rows of codes, so fewer rows would read more x than codes.
# Two stages save 0.1 instructions, but then the load of a step's scale waits for that of its 8-bit code.
_BATCH_ROWS = ((8, 32), (16, 64))


def plan(m: int, shape: tuple[int, int], *, n_multiprocessors: int) -> LaunchPlan:
    """Return the launch for x [m, K] and a weight [N, K] on a device with so many multiprocessors."""
    n, k = shape
    batch, rows = next(pair for pair in _BATCH_ROWS if m <= pair[0])
    n_programs = max(1, -(-n // rows))
    wanted = PROGRAMS_PER_MULTIPROCESSOR * n_multiprocessors // n_programs
    # A split writes and reads back m float32 a row of W: up to 1/8 byte a weight, a quarter of the codes, out of L2.
    affordable = k // (64 * max(1, m))
    most = k // STEP // MIN_STEPS_PER_SPLIT
    return LaunchPlan(batch, rows, splits=max(1, min(wanted, affordable, most)))


def constants(plan: LaunchPlan, shape: tuple[int, int], block_size: int, *, double_quant: bool) -> dict[str, Any]:
    """Return the kernel's compile-time arguments: the launch and `tools/gpu/kernel_cases.py` use the same."""
    return {
        "BLOCK_SIZE": block_size,
        "NESTED": double_quant,
        "BATCH": plan.batch,
        "ROWS": plan.rows,
        "WARPS": plan.n_warps,
        "TAIL": shape[1] % STEP != 0,
    }


def options(plan: LaunchPlan) -> dict[str, Any]:
    """Return the compiler's options. A fused multiply-add would round the absmax once instead of twice."""
    return {"num_warps": plan.n_warps, "num_stages": plan.n_stages, "enable_fp_fusion": False}


def product_unsupported(m: int, weight_shape: tuple[int, int], block_size: int, dtype: torch.dtype) -> str | None:
    """Return why `product` does not take x [m, K] of `dtype` and a weight [N, K], or None if it does."""
    n, k = weight_shape
    if m > MAX_ROWS_FROM_CODES:
        return f"m = {m}: the fused product takes at most {MAX_ROWS_FROM_CODES} rows"
    if dtype not in DTYPES:
        return f"{dtype}: the fused product takes bfloat16 and float16"
    if block_size not in BLOCK_SIZES:
        return f"block size {block_size}: expected one of {BLOCK_SIZES}"
    if k % SEGMENT:
        return f"K = {k} is no multiple of {SEGMENT}"
    if n * k > MAX_ELEMENTS:
        return f"{n} x {k} weights are more than 2**34"
    return None


def product(x: Tensor, weight: PackedWeight, out: Tensor) -> None:
    """Write x W^T into `out` [M, N]: x bf16 or fp16 [M, K], M <= 16, out of x's dtype or float32; asynchronous.

    Allocates float32 [splits, M, N] if the grid would be small. Raises UsageError if the tensors do not fit each other,
    are not contiguous, 16-byte aligned and on one CUDA device, or `product_unsupported` gives a reason.
    """
    chosen = plan(x.shape[0], weight.shape, n_multiprocessors=multiprocessors(weight.device)) if _fits(x) else None
    if chosen is None:
        raise UsageError(f"x: {x.dtype} {list(x.shape)}, expected [M, K] with M <= {MAX_ROWS_FROM_CODES}")
    product_as_planned(x, weight, out, chosen)


def product_as_planned(x: Tensor, weight: PackedWeight, out: Tensor, plan: LaunchPlan) -> None:
    """`product` with a given launch: for measurements and tests."""
    _check(x, weight, out)
    (m, k), n = x.shape, weight.shape[0]
    if m * n == 0:
        return
    from qformat.kernels.triton.product_kernel import product_kernel, sum_splits_kernel

    target = out if plan.splits == 1 else torch.empty((plan.splits, m, n), dtype=torch.float32, device=x.device)
    with on_device(weight.device):
        product_kernel[(-(-n // plan.rows), plan.splits)](
            x,
            weight.packed,
            weight.absmax,
            weight.nested_absmax,
            weight.nested_quant_map,
            weight.nested_offset,
            target,
            m,
            n,
            k // SEGMENT,
            **constants(plan, weight.shape, weight.block_size, double_quant=weight.double_quant),
            **options(plan),
        )
        if target is not out:
            grid = (-(-m * n // SUM_BLOCK),)
            sum_splits_kernel[grid](target, out, plan.splits, m * n, **SUM_OPTIONS)


def _fits(x: Tensor) -> bool:
    return x.dim() == 2 and x.shape[0] <= MAX_ROWS_FROM_CODES


def _check(x: Tensor, weight: PackedWeight, out: Tensor) -> None:
    n, k = weight.shape
    if not _fits(x) or x.shape[1] != k:
        raise UsageError(f"x: {x.dtype} {list(x.shape)}, expected [M, {k}] with M <= {MAX_ROWS_FROM_CODES}")
    reason = product_unsupported(x.shape[0], weight.shape, weight.block_size, x.dtype)
    if reason is not None:
        raise UsageError(f"{reason}. Dequantize the weight and use a matrix product")
    if tuple(out.shape) != (x.shape[0], n) or out.dtype not in (x.dtype, torch.float32):
        raise UsageError(f"out: {out.dtype} {list(out.shape)}, expected {x.dtype} or float32 {[x.shape[0], n]}")
    check_tensors(weight.device, x=x, out=out)
    check_aligned(x=x, packed=weight.packed)
