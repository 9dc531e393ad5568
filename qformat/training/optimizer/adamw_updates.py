"""AdamW on parts of parameters, with the bits that torch gives for whole ones.

    p <- p (1 - lr wd)
    m <- m + (g - m)(1 - beta1)
    v <- v beta2 + g g (1 - beta2)
    p <- p - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

No update allocates memory once it has begun to write: what it needs is in the workspace that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK_SIZE = 2**18
"""Elements that an update of several operations takes at a time, a multiple of 256: they stay in the cache between
operations. 200 million float32 parameters on two cores: 0.3 times the time of whole tensors."""


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """The numbers of a parameter group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> AdamSettings:
        """Read them from a group of `param_groups`, as schedulers left it."""
        beta1, beta2 = group["betas"]
        return cls(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])


@dataclass(slots=True)
class Piece:
    """Neighbouring elements of one parameter, in the order of memory; either all, in the parameter's shape, or [n]."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """Steps including this one, float32 []."""


class Update(Protocol):
    """A way to compute AdamW."""

    steps_on_device: bool
    """Whether step counts are read on the parameters' device, or by Python."""

    def workspace_nbytes(self, dtypes: set[torch.dtype]) -> int:
        """Return how much device memory `apply` needs for parameters of these dtypes."""

    def apply(self, pieces: Sequence[Piece], settings: AdamSettings, workspace: Tensor | None) -> None:
        """Update parameters and states of one dtype each; `workspace` is uint8 [workspace_nbytes]."""


class FusedUpdate:
    """torch's fused kernel: the bits of torch.optim.AdamW(fused=True), which is the default of transformers."""

    steps_on_device = True

    def workspace_nbytes(self, dtypes: set[torch.dtype]) -> int:
        """Return 0: one kernel does it all."""
        return 0

    def apply(self, pieces: Sequence[Piece], settings: AdamSettings, workspace: Tensor | None) -> None:
        """Update all pieces with one call."""
        torch._fused_adamw_(
            [piece.param for piece in pieces],
            [piece.grad for piece in pieces],
            [piece.exp_avg for piece in pieces],
            [piece.exp_avg_sq for piece in pieces],
            [],
            [piece.step for piece in pieces],
            lr=settings.lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
        )


class SingleUpdate:
    """One operation after the other: the bits of torch.optim.AdamW(foreach=False).

    The operations of `torch.optim.adam._single_tensor_adam`, in its order and rounding, but with the denominator in the
    workspace: that function allocates between writing the first moment and the parameter.
    """

    steps_on_device = False

    def workspace_nbytes(self, dtypes: set[torch.dtype]) -> int:
        """Return the size of one chunk."""
        return CHUNK_SIZE * max(dtype.itemsize for dtype in dtypes)

    def apply(self, pieces: Sequence[Piece], settings: AdamSettings, workspace: Tensor | None) -> None:
        """Update piece by piece, chunk by chunk."""
        assert workspace is not None
        for piece in pieces:
            t = piece.step.item()
            denominators = workspace.view(piece.param.dtype)
            step_size = settings.lr / (1 - settings.beta1**t)
            root = (1 - settings.beta2**t) ** 0.5
            for param, grad, m, v in chunks(piece):
                if settings.weight_decay != 0:
                    param.mul_(1 - settings.lr * settings.weight_decay)
                m.lerp_(grad, 1 - settings.beta1)
                v.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
                denominator = denominators[: v.numel()].view(v.shape)
                torch.sqrt(v, out=denominator)
                denominator.div_(root).add_(settings.eps)
                param.addcdiv_(m, denominator, value=-step_size)


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a dense tensor as [numel] in the order of its memory, sharing it."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def chunks(piece: Piece) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return parameter, gradient and float moments in chunks of at most `CHUNK_SIZE` elements, each [n]."""
    p, g, m, v = (in_memory_order(x) for x in (piece.param, piece.grad, piece.exp_avg, piece.exp_avg_sq))
    if p.numel() <= CHUNK_SIZE:
        return [(p, g, m, v)]
    return list(zip(*(torch.split(tensor, CHUNK_SIZE) for tensor in (p, g, m, v)), strict=True))
