"""A causal model in two parts: what makes hidden states, and the last product, which can be taken a few rows at a time.

The logits of a whole batch are the largest tensor of a step (vocabulary times tokens); with the head apart, losses need
only those of a chunk of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK_NBYTES = 16 << 20
"""Several tensors of a chunk of positions exist at a time."""


@dataclass(frozen=True, slots=True)
class SplitModel:
    """body: ids [B, L] -> hidden states [B, L, H]. head: hidden states [P, H] -> logits [P, V].

    chunk_nbytes: float32 logits of a chunk of positions.
    """

    body: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    vocabulary: int
    chunk_nbytes: int = CHUNK_NBYTES

    def chunks(self, n_positions: int) -> list[slice]:
        """Return the ranges of positions to take logits of at a time."""
        step = max(1, self.chunk_nbytes // (4 * self.vocabulary))
        return [slice(start, min(start + step, n_positions)) for start in range(0, n_positions, step)]


def split_head(model: PreTrainedModel) -> SplitModel:
    """Split a model whose logits are its output layer's; of another one (scaled or capped logits) the head is nothing.

    Which it is, is tried out on four tokens.
    """
    base, output = model.base_model, model.get_output_embeddings()  # type: ignore[no-untyped-call]
    vocabulary = int(model.config.get_text_config().vocab_size)

    def whole(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    def body(ids: Tensor) -> Tensor:
        hidden: Tensor = base(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    if base is not model and isinstance(output, nn.Module):
        ids = torch.arange(4, device=model.device)[None] % vocabulary
        with torch.no_grad():
            logits = whole(ids)
            split = base(input_ids=ids, use_cache=False)
            if hasattr(split, "last_hidden_state") and torch.equal(output(split.last_hidden_state), logits):
                return SplitModel(body, output, logits.shape[-1])
    return SplitModel(whole, lambda logits: logits, vocabulary)
