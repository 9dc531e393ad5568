"""The product of a few rows with a 4-bit weight on a GPU, for token generation: out = x W^T without a 16-bit W.

W is bit-identical to the result of `dequantize`, except for the sign of zeros. Sums are float32. Their order depends
only on the shapes and the device, so the result is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import UsageError
from qformat.kernels.implementations import MAX_ROWS_FROM_CODES
from qformat.kernels.packed_weight import PackedWeight
from qformat.kernels.triton.launch import check_aligned, check_tensors, multiprocessors, on_device

SEGMENT = 64
"""Columns that a lane decodes of one row; K must be a multiple of it."""

STEP = 256
"""Columns per loop step."""

MAX_ELEMENTS = 2**34
"""Largest number of elements: the kernel counts words of 8 elements in int32."""

DTYPES = (torch.bfloat16, torch.float16)

PROGRAMS_PER_MULTIPROCESSOR = 8
"""Programs per multiprocessor from which K is no longer split. With 80-96 registers and 64 threads, 10 programs of 32
rows are resident at once. The value is reasoned, not measured; `python -m tools.gpu.check` times the alternatives."""

MIN_STEPS_PER_SPLIT = 2
"""Smallest number of steps per split: with one step there is nothing to prefetch."""

SUM_BLOCK = 512
SUM_OPTIONS: dict[str, Any] = {"BLOCK": SUM_BLOCK, "num_warps": 4}


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How to launch the product for one shape.

    Attributes:
        batch: Columns of the tensor-core operand that holds x: 8 or 16.
        rows: Rows of the weight per program.
        splits: Number of splits of K.
        n_warps: Warps per program.
        n_stages: Stages of the software pipeline.
    """

    batch: int
    rows: int
    splits: int
    n_warps: int = 2
    n_stages: int = 3


# Instructions per weight in the K loop, registers, shared memory (sm_90, three stages, block size 64, double
# quantization):
#     batch  8, rows 32: 4.22, 80, 18 KB    rows 64: 4.02, 128, 28 KB
#     batch 16, rows 32: 4.70, 106, 26 KB   rows 64: 4.44, 176, 36 KB
# For m <= 8, 32 rows are best: twice as many programs for small N and 20 warps per multiprocessor, for 0.2 instructions
# more. For m > 8, 64 rows are best: a program reads 8 KB of x per step, as much as 64 rows of codes, so with fewer rows
# it would read more of x than of the codes.
# Two stages save 0.1 instructions, but then the load of a step's scale waits for the load of its 8-bit code.
_BATCH_ROWS = ((8, 32), (16, 64))


def plan(m: int, shape: tuple[int, int], *, n_multiprocessors: int) -> LaunchPlan:
    """Return the launch for a product.

    Args:
        m: Number of rows of x.
        shape: Shape (N, K) of the weight.
        n_multiprocessors: Number of multiprocessors of the device.
    """
    n, k = shape
    batch, rows = next(pair for pair in _BATCH_ROWS if m <= pair[0])
    n_programs = max(1, -(-n // rows))
    wanted = PROGRAMS_PER_MULTIPROCESSOR * n_multiprocessors // n_programs
    # A split writes and reads back m float32 per row of W: up to 1/8 byte per weight, a quarter of the codes, in L2.
    affordable = k // (64 * max(1, m))
    most = k // STEP // MIN_STEPS_PER_SPLIT
    return LaunchPlan(batch, rows, splits=max(1, min(wanted, affordable, most)))


def constants(plan: LaunchPlan, shape: tuple[int, int], block_size: int, *, double_quant: bool) -> dict[str, Any]:
    """Return the kernel's compile-time arguments, for the launch and for `tools/gpu/kernel_cases.py`.

    Args:
        plan: Launch of the product.
        shape: Shape (N, K) of the weight.
        block_size: Number of elements per block.
        double_quant: Whether the absmax values are themselves quantized.
    """
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
    """Return why `product` does not support these arguments, or None if it does.

    Args:
        m: Number of rows of x.
        weight_shape: Shape (N, K) of the weight.
        block_size: Number of elements per block.
        dtype: Dtype of x.
    """
    n, k = weight_shape
    if m > MAX_ROWS_FROM_CODES:
        return f"x has {m} rows; the fused product supports at most {MAX_ROWS_FROM_CODES}"
    if dtype not in DTYPES:
        return f"x has dtype {dtype}; the fused product supports bfloat16 and float16"
    if block_size not in BLOCK_SIZES:
        return f"block size {block_size}: expected one of {BLOCK_SIZES}"
    if k % SEGMENT:
        return f"K = {k} is not a multiple of {SEGMENT}"
    if n * k > MAX_ELEMENTS:
        return f"the weight has {n} x {k} elements; the fused product supports at most 2**34"
    return None


def product(x: Tensor, weight: PackedWeight, out: Tensor) -> None:
    """Compute out = x W^T. The call is asynchronous.

    If the grid would be small, K is split, and float32 [splits, M, N] is allocated for the partial sums.

    Args:
        x: Activations [M, K], M at most 16, in bf16 or fp16.
        weight: Weight [N, K].
        out: Tensor for the result, [M, N], in x's dtype or float32.

    Raises:
        UsageError: The tensors do not fit each other, are not contiguous, 16-byte aligned and on one CUDA device, or
            `product_unsupported` returns a reason.
    """
    chosen = plan(x.shape[0], weight.shape, n_multiprocessors=multiprocessors(weight.device)) if _fits(x) else None
    if chosen is None:
        raise UsageError(f"x: found {x.dtype} {list(x.shape)}, expected [M, K] with M <= {MAX_ROWS_FROM_CODES}")
    product_as_planned(x, weight, out, chosen)


def product_as_planned(x: Tensor, weight: PackedWeight, out: Tensor, plan: LaunchPlan) -> None:
    """Compute `product` with a given launch, for measurements and tests.

    Args:
        x: Activations [M, K], M at most 16, in bf16 or fp16.
        weight: Weight [N, K].
        out: Tensor for the result, [M, N], in x's dtype or float32.
        plan: Launch of the product.

    Raises:
        UsageError: As for `product`.
    """
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
        raise UsageError(f"x: found {x.dtype} {list(x.shape)}, expected [M, {k}] with M <= {MAX_ROWS_FROM_CODES}")
    reason = product_unsupported(x.shape[0], weight.shape, weight.block_size, x.dtype)
    if reason is not None:
        raise UsageError(f"{reason}. Dequantize the weight and use an ordinary matrix product")
    if tuple(out.shape) != (x.shape[0], n) or out.dtype not in (x.dtype, torch.float32):
        raise UsageError(f"out: found {out.dtype} {list(out.shape)}, expected {x.dtype} or float32 {[x.shape[0], n]}")
    check_tensors(weight.device, x=x, out=out)
    check_aligned(x=x, packed=weight.packed)
