"""The loss of a training on tensors without memory: that of trl, stood in for, or that of transformers, as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from qformat.training.memory_plan.meter import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Literal["tiled", "logits"]
"""trl's, which multiplies by the output layer piece by piece, or transformers' own, which makes all logits."""

_LOSS_TOKENS, _LOSS_COLUMNS = 4096, 32768
"""The tile of trl's loss (trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE; trl/trainer/utils.py, chunk size)."""


def tiled_loss(base: PreTrainedModel, inputs: dict[str, Any], meter: Meter) -> Tensor:
    """Run the model and the stand-in of trl's loss; the loss's segment begins with it."""
    hidden = base.base_model(**inputs).last_hidden_state[:, :-1]
    meter.mark("loss", None)
    output = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    rows = hidden.reshape(-1, hidden.shape[-1])
    scored = rows.index_select(0, torch.arange(rows.shape[0]))
    return cast(Tensor, _TiledLoss.apply(scored, output.weight, output.bias)).sum()  # type: ignore[no-untyped-call]


def full_loss(base: PreTrainedModel, inputs: dict[str, Any], meter: Meter) -> Tensor:
    """Run the model with transformers' own loss; its segment begins with the logits."""
    output = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = output.register_forward_pre_hook(lambda _module, _args: meter.mark("loss", None))
    try:
        return cast(Tensor, base(**inputs, labels=torch.zeros_like(inputs["input_ids"])).loss)
    finally:
        handle.remove()


class _TiledLoss(torch.autograd.Function):
    """The memory of trl's ChunkedLogProbFunction on a GPU."""

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
