"""The torch operations on 4-bit weights: `torch.ops.qformat.dequantize_nf4`, `.linear_nf4` and `.gemv_nf4`.

Each takes the components of a packed weight (see `PackedWeight`) as plain arguments, runs on CPU and CUDA tensors, has
a fake implementation and so works under `torch.compile(fullgraph=True)`. The base weight has no gradient.

They are custom operations, opaque to the compiler: a `triton_op` would be traced, kernel body included, even for CPU
tensors, which fails where there is no driver.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qformat.errors import UsageError
from qformat.kernels.cpu_features import compute_dtype
from qformat.kernels.few_rows import MAX_ROWS_FROM_CODES
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.implementations import implementation
from qformat.kernels.packed_weight import PackedWeight


@torch.library.custom_op("qformat::dequantize_nf4", mutates_args=())
def dequantize_nf4(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    nested_offset: float, block_size: int, rows: int, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the weight [rows, columns] in bf16, fp16 or fp32. Raises UsageError for components that do not fit."""
    weight = PackedWeight(packed, absmax, nested_absmax, nested_quant_map, nested_offset, block_size, (rows, columns))
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    implementation(packed.device).dequantize(weight, out)
    return out


@dequantize_nf4.register_fake
def _(packed: Tensor, *others: Any) -> Tensor:
    *_, rows, columns, dtype = others
    return packed.new_empty((rows, columns), dtype=dtype)


@torch.library.custom_op("qformat::dequantize_nf4_into", mutates_args=("out",))
def dequantize_nf4_into(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    nested_offset: float, block_size: int, out: Tensor,
) -> None:  # fmt: skip
    """Decode the weight into `out` [rows, columns], contiguous, bf16, fp16 or fp32."""
    if out.dim() != 2 or not out.is_contiguous() or out.device != packed.device:
        raise UsageError(
            f"out: shape {list(out.shape)} on {out.device}, expected contiguous [rows, columns] on {packed.device}"
        )
    shape = (out.shape[0], out.shape[1])
    weight = PackedWeight(packed, absmax, nested_absmax, nested_quant_map, nested_offset, block_size, shape)
    implementation(packed.device).dequantize(weight, out)


@torch.library.custom_op("qformat::linear_nf4", mutates_args=())
def linear_nf4(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    nested_offset: float, block_size: int, rows: int, columns: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return x [..., columns] times the transpose of the weight [rows, columns], plus bias [rows], in x's dtype.

    Differentiable in x and bias; nothing in 16 bit is kept for backward, the weight is decoded again.
    """
    weight = PackedWeight(packed, absmax, nested_absmax, nested_quant_map, nested_offset, block_size, (rows, columns))
    return linear(x, HeldWeight(weight), bias)


@linear_nf4.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    *_, rows, _columns, _bias = others
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("qformat::linear_nf4_input_gradient", mutates_args=())
def linear_nf4_input_gradient(
    grad: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    nested_offset: float, block_size: int, rows: int, columns: int,
) -> Tensor:  # fmt: skip
    """Return grad [..., rows] times the weight [rows, columns], in grad's dtype."""
    weight = PackedWeight(packed, absmax, nested_absmax, nested_quant_map, nested_offset, block_size, (rows, columns))
    return input_gradient(grad, weight)


@linear_nf4_input_gradient.register_fake
def _(grad: Tensor, *others: Any) -> Tensor:
    *_, columns = others
    return grad.new_empty((*grad.shape[:-1], columns))


def _keep_components(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_quant_map, *numbers, _ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_quant_map)
    ctx.numbers = numbers


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[9]
    grad_x = linear_nf4_input_gradient(grad, *ctx.saved_tensors, *ctx.numbers) if wants_x else None
    grad_bias = grad.flatten(0, -2).sum(0) if wants_bias else None
    return grad_x, None, None, None, None, None, None, None, None, grad_bias


linear_nf4.register_autograd(_backward, setup_context=_keep_components)


@torch.library.custom_op("qformat::gemv_nf4", mutates_args=())
def gemv_nf4(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    nested_offset: float, block_size: int, rows: int, columns: int,
) -> Tensor:  # fmt: skip
    """Return x [M, columns], M <= 16, times the weight's transpose, without writing the decoded weight to memory.

    Raises UsageError with the reason where the backend has no such product for these shapes and dtypes.
    """
    weight = PackedWeight(packed, absmax, nested_absmax, nested_quant_map, nested_offset, block_size, (rows, columns))
    backend = implementation(x.device)
    flat = _as_rows(x, columns)
    reason = backend.product_unsupported(flat.shape[0], weight, x.dtype)
    if reason is not None:
        raise UsageError(f"gemv_nf4: {reason}. Use linear_nf4, which decodes the weight where it must")
    return backend.product(flat, HeldWeight(weight))


@gemv_nf4.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    *_, rows, _columns = others
    return x.new_empty((x.shape[0], rows))


def linear(x: Tensor, held: HeldWeight, bias: Tensor | None = None) -> Tensor:
    """`linear_nf4` without gradients and without torch's dispatcher (20 us a call): for eager inference."""
    weight = held.weight
    rows, columns = weight.shape
    flat = _as_rows(x, columns)
    if x.device != weight.device:
        raise UsageError(f"x: on {x.device}, but the weight is on {weight.device}")
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], rows))
    backend = implementation(x.device)
    if flat.shape[0] <= MAX_ROWS_FROM_CODES and backend.product_unsupported(flat.shape[0], weight, x.dtype) is None:
        out = backend.product(flat, held)
        if bias is not None:
            out += bias
    else:
        dtype = product_dtype(flat)
        out = backend.linear(flat.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
    return out.view(*x.shape[:-1], rows)


def input_gradient(grad: Tensor, weight: PackedWeight) -> Tensor:
    """`linear_nf4_input_gradient` without torch's dispatcher: for autograd functions that are already past it."""
    rows, columns = weight.shape
    flat = _as_rows(grad, rows)
    dtype = product_dtype(flat)
    out = implementation(grad.device).input_gradient(flat.to(dtype), weight)
    return out.to(grad.dtype).view(*grad.shape[:-1], columns)


def _as_rows(x: Tensor, columns: int) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != columns:
        raise UsageError(f"x: shape {list(x.shape)}, expected [..., {columns}]")
    return x.reshape(-1, columns).contiguous()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with x are computed: that of x but for CPUs that are slow in it."""
    return compute_dtype(x.dtype) if x.device.type == "cpu" else x.dtype
