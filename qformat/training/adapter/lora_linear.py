"""Computes LoRA on a packed layer as a single autograd node.

                    x [M, K]
              ┌────────┴───────────┐
              │                    │ dropout
              │                    x' [M, K]                saved for backward
     ┌────────▼─────────┐          │
     │ W [N, K] frozen  │     ┌────▼──────────┐
     │ NF4 codes,       │     │ A [r, K]      │            trained
     │ decoded into a   │     └────┬──────────┘
     │ shared buffer    │          x' A^T [M, r]            saved for backward
     └────────┬─────────┘     ┌────▼──────────┐
              │               │ B [N, r]      │            trained, starts at zero
              │               └────┬──────────┘
              │                    × s = alpha / r
              └────────►(+)◄───────┘
                         │
                         y [M, N]  =  x W^T + b + s (x' A^T) B^T

The rank r (16) is far smaller than K and N (thousands), so A and B hold about one percent of the elements of W. W has
no gradient, so backward does not need x: it decodes W again for the gradient of x. The next layer reuses the buffer.
PEFT's own layer creates five autograd nodes, computes the adapter in the adapter's dtype (float32 by default) and saves
the input twice.

The adapter is multiplied in the dtype of x, whatever dtype its parameters have. This is the bf16 compute type of the
QLoRA paper (Dettmers et al. 2023, equation 5). Gradients have the dtype of their parameters.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qformat.kernels import ops
from qformat.kernels.dispatch import as_autocast, may_bypass_dispatcher
from qformat.kernels.held_weight import HeldWeight
from qformat.model.nf4_linear import NF4Linear


class FrozenProduct(Protocol):
    """Products with a frozen weight, in any storage format."""

    def linear(self, x: Tensor) -> Tensor:
        """Return x [M, K] times the transposed weight, plus the bias, as a new tensor [M, N]."""

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return grad [M, N] times the weight, as a new tensor [M, K]."""


class NF4Product:
    """Products with the packed weight of an `NF4Linear`.

    Args:
        held: The packed weight.
        bias: Bias of the layer, [N], or None.
    """

    def __init__(self, held: HeldWeight, bias: Tensor | None) -> None:
        self._held = held
        self._bias = bias

    def linear(self, x: Tensor) -> Tensor:
        """Return x [M, K] times the transposed weight, plus the bias, [M, N]."""
        return ops.linear(x, self._held, self._bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return grad [M, N] times the weight, [M, K]."""
        return ops.input_gradient(grad, self._held.weight)


def lora_linear(
    x: Tensor, dropped: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, base: FrozenProduct
) -> Tensor:
    """Return base(x) + scaling * (x' A^T) B^T, differentiable in x, x', A and B.

    Args:
        x: Input, [..., K].
        dropped: Input after dropout (x'), [..., K], or None for no dropout.
        lora_a: Matrix A of the adapter, [r, K].
        lora_b: Matrix B of the adapter, [N, r].
        scaling: Scale of the adapter, alpha / r.
        base: Products with the frozen weight [N, K].

    Returns:
        The output, [..., N], in the dtype of x.
    """
    x, dropped = as_autocast(x), None if dropped is None else as_autocast(dropped)
    y: Tensor = _LoraLinear.apply(x, dropped, lora_a, lora_b, scaling, base)  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        base: FrozenProduct,
    ) -> Tensor:
        adapted = x if dropped is None else dropped
        rows, adapted_rows = x.reshape(-1, x.shape[-1]), adapted.reshape(-1, x.shape[-1])
        dtype = ops.product_dtype(rows)
        with torch.autocast(x.device.type, enabled=False):
            y = base.linear(rows).to(dtype)
            inner = adapted_rows.to(dtype) @ lora_a.to(dtype).t()
            y.addmm_(inner, lora_b.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(adapted, inner, lora_a, lora_b)
        ctx.scaling, ctx.base, ctx.is_dropped = scaling, base, dropped is not None
        return ops.reshaped(y.to(x.dtype), (*x.shape[:-1], lora_b.shape[0]))

    @staticmethod
    @once_differentiable  # autograd does not see the product, only its result
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        adapted, inner, lora_a, lora_b = ctx.saved_tensors
        wants_x, wants_dropped, wants_a, wants_b = ctx.needs_input_grad[:4]
        grad = grads[0].reshape(-1, lora_b.shape[0])
        dtype = inner.dtype
        with torch.autocast(grad.device.type, enabled=False):
            rows = grad.to(dtype)
            grad_inner = (rows @ lora_b.to(dtype)).mul_(ctx.scaling)
            grad_b = (rows.t() @ inner).to(lora_b.dtype).mul_(ctx.scaling) if wants_b else None
            adapted_rows = adapted.reshape(-1, adapted.shape[-1])
            grad_a = (grad_inner.t() @ adapted_rows.to(dtype)).to(lora_a.dtype) if wants_a else None
            grad_x = grad_dropped = None
            if wants_x:
                grad_x = ctx.base.input_gradient(grad).to(dtype)
                if not ctx.is_dropped:
                    grad_x.addmm_(grad_inner, lora_a.to(dtype))
                grad_x = ops.reshaped(grad_x.to(adapted.dtype), adapted.shape)
            if wants_dropped:
                grad_dropped = ops.reshaped((grad_inner @ lora_a.to(dtype)).to(adapted.dtype), adapted.shape)
        return grad_x, grad_dropped, grad_a, grad_b, None, None


class NF4LoraLinear(lora.Linear):
    """PEFT's LoRA layer around an `NF4Linear`, which runs plain LoRA as the single node of this module.

    LoRA is plain if there is one active adapter without DoRA or another variant, the adapter has no bias, and the bias
    of the base layer is frozen. In all other cases, and in torch's transforms, PEFT's own code runs on the `NF4Linear`.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output [..., out_features] in the dtype of x.

        Args:
            x: Input, [..., in_features].
            *args: Other arguments of PEFT's layer. With any, PEFT's own code runs.
            **kwargs: Other keyword arguments of PEFT's layer. With any, PEFT's own code runs.
        """
        adapter = None if args or kwargs or not may_bypass_dispatcher(x) else self._plain_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[adapter]
        dropped = dropout(x) if dropout.training and not isinstance(dropout, nn.Identity) else None
        layer = cast(NF4Linear, self.base_layer)
        lora_a = cast(nn.Linear, self.lora_A[adapter]).weight
        lora_b = cast(nn.Linear, self.lora_B[adapter]).weight
        base = NF4Product(layer.held_weight(), layer.bias)
        return lora_linear(x, dropped, lora_a, lora_b, self.scaling[adapter], base)

    def _plain_adapter(self) -> str | None:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        adapter: str = self.active_adapters[0]
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_bias[adapter]:
            return None
        bias = self.base_layer.bias
        return None if isinstance(bias, Tensor) and bias.requires_grad else adapter
