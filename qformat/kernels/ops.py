"""The torch operations on 4-bit weights: `torch.ops.qformat.dequantize_nf4`, `.linear_nf4` and `.gemv_nf4`.

Each takes the components of a packed weight (layout: see `PackedWeight`) as plain arguments and runs on CPU and CUDA
tensors. Fake implementations let them work under `torch.compile(fullgraph=True)`. The weight has no gradient.

They are custom operations, which the compiler does not look into. It would trace a `triton_op` with the kernel body,
even for CPU tensors, and that fails on machines without a GPU driver.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qformat.errors import UsageError
from qformat.kernels.cpu_features import compute_dtype
from qformat.kernels.dispatch import decode_in_transforms, refuse_forward_mode
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.implementations import MAX_ROWS_FROM_CODES, implementation
from qformat.kernels.packed_weight import PackedWeight


@torch.library.custom_op("qformat::dequantize_nf4", mutates_args=())
def dequantize_nf4(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    nested_offset: float, block_size: int, rows: int, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the decoded weight [rows, columns].

    Args:
        packed: Packed codes, uint8 [ceil(n / 2)].
        absmax: uint8 [n_blocks] with double quantization, float32 [n_blocks] without.
        nested_absmax: float32 [ceil(n_blocks / 256)], or None without double quantization.
        nested_quant_map: float32 [256], or None without double quantization.
        nested_offset: Offset of the nested absmax, 0.0 without double quantization.
        block_size: Number of elements per block.
        rows: Rows of the weight.
        columns: Columns of the weight.
        dtype: Dtype of the result: bf16, fp16 or fp32.

    Raises:
        UsageError: The components do not fit the shape or each other.
    """
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
    """Decode the weight into an existing tensor.

    Args:
        packed: Packed codes, uint8 [ceil(n / 2)].
        absmax: uint8 [n_blocks] with double quantization, float32 [n_blocks] without.
        nested_absmax: float32 [ceil(n_blocks / 256)], or None without double quantization.
        nested_quant_map: float32 [256], or None without double quantization.
        nested_offset: Offset of the nested absmax, 0.0 without double quantization.
        block_size: Number of elements per block.
        out: Tensor for the result, [rows, columns], contiguous, in bf16, fp16 or fp32.

    Raises:
        UsageError: The components do not fit the shape or each other.
    """
    if out.dim() != 2 or not out.is_contiguous() or out.device != packed.device:
        raise UsageError(
            f"out: found shape {list(out.shape)} on {out.device}, "
            f"expected contiguous [rows, columns] on {packed.device}"
        )
    shape = (out.shape[0], out.shape[1])
    weight = PackedWeight(packed, absmax, nested_absmax, nested_quant_map, nested_offset, block_size, shape)
    implementation(packed.device).dequantize(weight, out)


@torch.library.custom_op("qformat::linear_nf4", mutates_args=())
def linear_nf4(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    nested_offset: float, block_size: int, rows: int, columns: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return x times the transposed weight, plus the bias: [..., rows] in x's dtype.

    The result is differentiable with respect to x and the bias. The backward pass decodes the weight again, so no
    decoded weight is kept.

    Args:
        x: Activations [..., columns].
        packed: Packed codes, uint8 [ceil(n / 2)].
        absmax: uint8 [n_blocks] with double quantization, float32 [n_blocks] without.
        nested_absmax: float32 [ceil(n_blocks / 256)], or None without double quantization.
        nested_quant_map: float32 [256], or None without double quantization.
        nested_offset: Offset of the nested absmax, 0.0 without double quantization.
        block_size: Number of elements per block.
        rows: Rows of the weight.
        columns: Columns of the weight.
        bias: Bias [rows], or None.

    Raises:
        UsageError: The components do not fit the shape or each other.
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
    """Return the gradient of the input of `linear_nf4`: [..., columns] in the dtype of `grad`.

    Args:
        grad: Gradient of the output [..., rows].
        packed: Packed codes, uint8 [ceil(n / 2)].
        absmax: uint8 [n_blocks] with double quantization, float32 [n_blocks] without.
        nested_absmax: float32 [ceil(n_blocks / 256)], or None without double quantization.
        nested_quant_map: float32 [256], or None without double quantization.
        nested_offset: Offset of the nested absmax, 0.0 without double quantization.
        block_size: Number of elements per block.
        rows: Rows of the weight.
        columns: Columns of the weight.

    Raises:
        UsageError: The components do not fit the shape or each other.
    """
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
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None
    return grad_x, None, None, None, None, None, None, None, None, grad_bias


def _decoded_linear(x: Tensor, *others: Any) -> Tensor:
    *components, bias = others
    return functional.linear(x, dequantize_nf4(*components, x.dtype), bias)


def _keep_components_of_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_quant_map, *ctx.numbers = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_quant_map)


def _backward_of_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return linear_nf4(grad, *ctx.saved_tensors, *ctx.numbers, None), *[None] * 8


def _decoded_input_gradient(grad: Tensor, *components: Any) -> Tensor:
    return torch.matmul(grad, dequantize_nf4(*components, grad.dtype))


linear_nf4.register_autograd(_backward, setup_context=_keep_components)
linear_nf4_input_gradient.register_autograd(_backward_of_gradient, setup_context=_keep_components_of_gradient)
decode_in_transforms(linear_nf4, _decoded_linear)
decode_in_transforms(linear_nf4_input_gradient, _decoded_input_gradient)


@torch.library.custom_op("qformat::gemv_nf4", mutates_args=())
def gemv_nf4(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    nested_offset: float, block_size: int, rows: int, columns: int,
) -> Tensor:  # fmt: skip
    """Return x times the transposed weight, [M, rows], without writing the decoded weight to memory.

    Args:
        x: Activations [M, columns], M at most 16.
        packed: Packed codes, uint8 [ceil(n / 2)].
        absmax: uint8 [n_blocks] with double quantization, float32 [n_blocks] without.
        nested_absmax: float32 [ceil(n_blocks / 256)], or None without double quantization.
        nested_quant_map: float32 [256], or None without double quantization.
        nested_offset: Offset of the nested absmax, 0.0 without double quantization.
        block_size: Number of elements per block.
        rows: Rows of the weight.
        columns: Columns of the weight.

    Raises:
        UsageError: The backend does not support these shapes or dtypes; the message gives the reason.
    """
    weight = PackedWeight(packed, absmax, nested_absmax, nested_quant_map, nested_offset, block_size, (rows, columns))
    backend = implementation(x.device)
    flat = _as_rows(x, columns)
    reason = backend.product_unsupported(flat.shape[0], weight, x.dtype)
    if reason is not None:
        raise UsageError(f"gemv_nf4: {reason}. Use linear_nf4, which decodes the weight if necessary")
    out = x.new_empty((flat.shape[0], rows))
    backend.product(flat, HeldWeight(weight), out)
    return out


@gemv_nf4.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    *_, rows, _columns = others
    return x.new_empty((x.shape[0], rows))


for operation in (dequantize_nf4, dequantize_nf4_into, gemv_nf4):
    refuse_forward_mode(operation)


def linear(x: Tensor, held: HeldWeight, bias: Tensor | None = None) -> Tensor:
    """Compute `linear_nf4` without gradients and without torch's dispatcher (20 us per call), for eager inference.

    Args:
        x: Activations [..., columns].
        held: Weight [rows, columns].
        bias: Bias [rows], or None.

    Returns:
        x times the transposed weight, plus the bias: [..., rows] in x's dtype.

    Raises:
        UsageError: The last dimension of x is not `columns`, or x is on another device than the weight.
    """
    weight = held.weight
    rows, columns = weight.shape
    flat = _as_rows(x, columns)
    if x.device != weight.device:
        raise UsageError(f"x: is on {x.device}, but the weight is on {weight.device}")
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], rows))
    backend = implementation(x.device)
    if flat.shape[0] <= MAX_ROWS_FROM_CODES and backend.product_unsupported(flat.shape[0], weight, x.dtype) is None:
        out = x.new_empty((*x.shape[:-1], rows))
        backend.product(flat, held, out)
        if bias is not None:
            out += bias
        return out
    dtype = product_dtype(flat)
    out = backend.linear(flat.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
    return reshaped(out, (*x.shape[:-1], rows))


def input_gradient(grad: Tensor, weight: PackedWeight) -> Tensor:
    """Compute `linear_nf4_input_gradient` without torch's dispatcher, for autograd functions that are already past it.

    Args:
        grad: Gradient of the output [..., rows].
        weight: Weight [rows, columns].
    """
    rows, columns = weight.shape
    flat = _as_rows(grad, rows)
    dtype = product_dtype(flat)
    out = implementation(grad.device).input_gradient(flat.to(dtype), weight)
    return reshaped(out.to(grad.dtype), (*grad.shape[:-1], columns))


def reshaped(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a new result in another shape without a copy and, in autograd's eyes, without a view.

    Callers may change a result in place, as PEFT's methods do. Autograd refuses that for a view that an operation
    returned.

    Args:
        result: Contiguous tensor that nothing else uses.
        shape: New shape, with as many elements.
    """
    return torch.ops.aten._unsafe_view.default(result, shape)  # type: ignore[no-any-return]


def _as_rows(x: Tensor, columns: int) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != columns:
        raise UsageError(f"x: found shape {list(x.shape)}, expected [..., {columns}]")
    return x.reshape(-1, columns).contiguous()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with x are computed: x's dtype, except on CPUs that are slow in it."""
    return compute_dtype(x.dtype) if x.device.type == "cpu" else x.dtype
