"""LoRA on a packed layer as one autograd node: y = x W^T + b + s (x' A^T) B^T, where x' is x, or x after dropout.

PEFT's own layer makes five nodes of it, computes the adapter in the adapter's dtype (float32 by default) and keeps x
twice. Here W is decoded into a scratch buffer that the next layer reuses, once in forward and once more in backward;
kept are x' and x' A^T. W has no gradient, so x itself is not needed.

The adapter is multiplied in the dtype of x, as the QLoRA paper's bf16 compute type has it (Dettmers et al. 2023,
equation 5), whatever dtype its parameters have; their gradients have the parameters' dtype.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

from qformat.errors import UsageError
from qformat.kernels import ops
from qformat.kernels.held_weight import HeldWeight
from qformat.model.nf4_linear import NF4Linear


class FrozenProduct(Protocol):
    """A weight without gradient, in whatever form it is kept."""

    def linear(self, x: Tensor) -> Tensor:
        """Return x [M, K] times the weight's transpose, plus bias: a new tensor [M, N]."""

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return grad [M, N] times the weight: a new tensor [M, K]."""


class NF4Product:
    """The weight of an `NF4Linear`."""

    def __init__(self, held: HeldWeight, bias: Tensor | None) -> None:
        self._held = held
        self._bias = bias

    def linear(self, x: Tensor) -> Tensor:
        """Return x [M, K] times the weight's transpose, plus bias, [M, N]."""
        return ops.linear(x, self._held, self._bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return grad [M, N] times the weight, [M, K]."""
        return ops.input_gradient(grad, self._held.weight)


def lora_linear(
    x: Tensor, dropped: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, base: FrozenProduct
) -> Tensor:
    """Return base(x) + scaling * (x' A^T) B^T, [..., N] in x's dtype, differentiable in x, x', A and B.

    x: [..., K]. dropped: x', [..., K], None for x itself. lora_a: [r, K]. lora_b: [N, r].
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        dropped = None if dropped is None else dropped.to(x.dtype)
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
        return y.to(x.dtype).view(*x.shape[:-1], lora_b.shape[0])

    @staticmethod
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
                grad_x = grad_x.to(adapted.dtype).view(adapted.shape)
            if wants_dropped:
                grad_dropped = (grad_inner @ lora_a.to(dtype)).to(adapted.dtype).view(adapted.shape)
        return grad_x, grad_dropped, grad_a, grad_b, None, None


class NF4LoraLinear(lora.Linear):
    """PEFT's LoRA layer around an `NF4Linear`, with the node above wherever LoRA is plain.

    Plain: one active adapter without DoRA or another variant, no bias of its own, a base bias that is frozen. In all
    other cases, and under torch.compile, PEFT's own code runs on the differentiable layer.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [..., out_features] in x's dtype for x [..., in_features]."""
        adapter = None if args or kwargs or torch.compiler.is_compiling() else self._plain_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[adapter]
        dropped = dropout(x) if dropout.training and not isinstance(dropout, nn.Identity) else None
        layer = cast(NF4Linear, self.base_layer)
        lora_a = cast(nn.Linear, self.lora_A[adapter]).weight
        lora_b = cast(nn.Linear, self.lora_B[adapter]).weight
        base = NF4Product(layer.held_weight(), layer.bias)
        return lora_linear(x, dropped, lora_a, lora_b, self.scaling[adapter], base)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: 4-bit weights cannot take an adapter in without being quantized anew. Raises UsageError."""
        raise UsageError(
            "an adapter cannot be merged into 4-bit weights. Export the artifact to 16 bit (qformat export), load the "
            "adapter on that and merge there"
        )

    def _plain_adapter(self) -> str | None:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        adapter: str = self.active_adapters[0]
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_bias[adapter]:
            return None
        bias = self.base_layer.bias
        return None if isinstance(bias, Tensor) and bias.requires_grad else adapter
