"""Runs the loss of a training on fake tensors: a stand-in for trl's loss, or transformers' own loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from qformat.training.memory_plan.meter import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Literal["tiled", "logits"]
"""Implementation of the loss. "tiled" is that of trl, which multiplies by the output layer tile by tile; "logits" is
that of transformers, which computes all logits at once."""

_LOSS_TOKENS, _LOSS_COLUMNS = 4096, 32768
"""Tile size of trl's loss (trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE; trl/trainer/utils.py, chunk size)."""


def tiled_loss(base: PreTrainedModel, inputs: dict[str, Any], meter: Meter) -> Tensor:
    """Run the model and the stand-in for trl's loss.

    Args:
        base: Model without PEFT's wrapper, on fake tensors.
        inputs: Arguments of the model.
        meter: Meter that gets a new segment when the loss begins.

    Returns:
        The loss, a scalar.
    """
    hidden = base.base_model(**inputs).last_hidden_state[:, :-1]
    meter.mark("loss", None)
    output = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    rows = hidden.reshape(-1, hidden.shape[-1])
    scored = rows.index_select(0, torch.arange(rows.shape[0]))
    return cast(Tensor, _TiledLoss.apply(scored, output.weight, output.bias)).sum()  # type: ignore[no-untyped-call]


def full_loss(base: PreTrainedModel, inputs: dict[str, Any], meter: Meter) -> Tensor:
    """Run the model with transformers' own loss.

    Args:
        base: Model without PEFT's wrapper, on fake tensors.
        inputs: Arguments of the model.
        meter: Meter that gets a new segment when the logits begin.

    Returns:
        The loss, a scalar.
    """
    output = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = output.register_forward_pre_hook(lambda _module, _args: meter.mark("loss", None))
    try:
        return cast(Tensor, base(**inputs, labels=torch.zeros_like(inputs["input_ids"])).loss)
    finally:
        handle.remove()


class _TiledLoss(torch.autograd.Function):
    """Allocates the same memory as trl's ChunkedLogProbFunction on a GPU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        n = hidden.shape[0]
        statistics = [torch.empty(n, dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty(min(n, _LOSS_TOKENS), _LOSS_COLUMNS)
        del tile
        log_z, entropy = torch.empty_like(statistics[0]), torch.empty_like(statistics[0])
        ctx.save_for_backward(hidden, weight, bias, log_z, entropy)
        return statistics[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, _, _ = ctx.saved_tensors
        sums = [
            torch.zeros(tensor.shape, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=True)
        ]
        tile = hidden.new_empty(min(hidden.shape[0], _LOSS_TOKENS), _LOSS_COLUMNS)
        found = [None if total is None else total.to(hidden.dtype) for total in sums]
        del tile
        return tuple(found)
