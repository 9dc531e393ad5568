"""A linear operation with trainable scales: `torch.ops.qformat.linear_nf4_scaled` and its gradients.

    y = x W^T + bias,    W[n, k] = codebook[code[n, k]] * scale[b]

The codes are constant. The scales are float32, one per block b, and have the gradient

    d scale[b] = sum over block b of dW[n, k] * codebook[code[n, k]],    dW = dy^T x

dW is computed in bands of rows, so the gradient of the whole weight never exists in memory:

    dy [M, N]  ┐          dW, rows 0 .. r-1    ──► d scale of their blocks
    x  [M, K]  ┴ mm ───►  dW, rows r .. 2r-1   ──► d scale of their blocks    (in the same buffer)

As in `ops`, the weight is decoded again for the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qformat.errors import UsageError
from qformat.kernels import ops
from qformat.kernels.dispatch import refuse_forward_mode
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.implementations import implementation
from qformat.kernels.packed_weight import PackedWeight

MAX_CHUNK_ELEMENTS = 1 << 22
"""Largest number of elements of the weight's gradient in memory at a time: 8 MiB in bf16."""


@torch.library.custom_op("qformat::linear_nf4_scaled", mutates_args=())
def linear_nf4_scaled(
    x: Tensor, packed: Tensor, scales: Tensor, block_size: int, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    """Return x times the transposed weight, plus the bias: [..., rows] in x's dtype.

    The result is differentiable with respect to x, the scales and the bias.

    Args:
        x: Activations [..., columns].
        packed: Packed codes, uint8 [ceil(n / 2)].
        scales: Scale of each block, float32 [n_blocks].
        block_size: Number of elements per block.
        rows: Rows of the weight.
        columns: Columns of the weight.
        bias: Bias [rows], or None.
    """
    return ops.linear(x, HeldWeight(_weight(packed, scales, block_size, rows, columns)), bias)


@linear_nf4_scaled.register_fake
def _(x: Tensor, packed: Any, scales: Any, block_size: Any, rows: int, columns: Any, bias: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("qformat::linear_nf4_scale_gradient", mutates_args=())
def linear_nf4_scale_gradient(
    grad: Tensor, x: Tensor, packed: Tensor, scales: Tensor, block_size: int, rows: int, columns: int
) -> Tensor:
    """Return the gradient of the scales, float32 [n_blocks].

    The products are computed in the dtype of the forward product and summed over each block in float32.

    Args:
        grad: Gradient of the output [..., rows].
        x: Activations [..., columns].
        packed: Packed codes, uint8 [ceil(n / 2)].
        scales: Scale of each block, float32 [n_blocks].
        block_size: Number of elements per block.
        rows: Rows of the weight.
        columns: Columns of the weight.
    """
    return scale_gradient(grad, x, _weight(packed, scales, block_size, rows, columns))


@linear_nf4_scale_gradient.register_fake
def _(grad: Any, x: Any, packed: Any, scales: Tensor, block_size: Any, rows: Any, columns: Any) -> Tensor:
    return scales.new_empty(scales.shape)


def scale_gradient(grad: Tensor, x: Tensor, weight: PackedWeight, *, max_elements: int = MAX_CHUNK_ELEMENTS) -> Tensor:
    """Compute `linear_nf4_scale_gradient` without torch's dispatcher.

    Args:
        grad: Gradient of the output [..., rows].
        x: Activations [..., columns].
        weight: Weight [rows, columns] with float32 scales as its absmax.
        max_elements: Largest number of elements of the weight's gradient in memory at a time.

    Returns:
        The gradient of the scales, float32 [n_blocks].

    Raises:
        UsageError: The shapes or dtypes of `grad` and x do not fit the weight.
    """
    rows, columns = weight.shape
    if grad.shape != (*x.shape[:-1], rows) or x.shape[-1] != columns or grad.dtype != x.dtype:
        raise UsageError(
            f"grad: found {grad.dtype} {list(grad.shape)} with x {x.dtype} {list(x.shape)}, "
            f"expected [..., {rows}] with x [..., {columns}] of the same dtype"
        )
    block_dots, block_size = implementation(x.device).block_dots, weight.block_size
    flat_x, flat_grad = x.reshape(-1, columns), grad.reshape(-1, rows)
    dtype = ops.product_dtype(flat_x)
    flat_x, flat_grad = flat_x.to(dtype), flat_grad.to(dtype)
    out = weight.absmax.new_empty(weight.absmax.shape)
    bands = weight.bands(max_elements)
    chunk = flat_x.new_empty(max(last - first for first, last in bands) * columns)
    for first, last in bands:
        start, stop = first * columns, last * columns
        part = chunk[: stop - start]
        torch.mm(flat_grad[:, first:last].t(), flat_x, out=part.view(last - first, columns))
        blocks = slice(start // block_size, -(-stop // block_size))
        block_dots(part, weight.packed.view(-1)[start // 2 : (stop + 1) // 2], block_size, out[blocks])
    return out


def _weight(packed: Tensor, scales: Tensor, block_size: int, rows: int, columns: int) -> PackedWeight:
    return PackedWeight(packed, scales, None, None, 0.0, block_size, (rows, columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, *numbers, _ = inputs
    # Only the gradient of the scales needs x.
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, packed, scales)
    ctx.numbers = numbers


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scales = ctx.saved_tensors
    wants_x, wants_scales, wants_bias = (ctx.needs_input_grad[index] for index in (0, 2, 6))
    grad_x = grad_scales = grad_bias = None
    if wants_x:
        nested = (None, None, 0.0)
        grad_x = ops.linear_nf4_input_gradient(grad, packed, scales, *nested, *ctx.numbers)
    if wants_scales:
        grad_scales = linear_nf4_scale_gradient(grad, x, packed, scales, *ctx.numbers)
    if wants_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, grad_scales, None, None, None, grad_bias


linear_nf4_scaled.register_autograd(_backward, setup_context=_keep)
refuse_forward_mode(linear_nf4_scaled)
refuse_forward_mode(linear_nf4_scale_gradient)
