"""Splits a causal model into a body, which computes hidden states, and a head, which computes logits.

The logits of a whole batch are the largest tensor of a step (vocabulary times tokens). With a separate head, losses
need the logits of only one chunk of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qformat.model.boundary import forward_errors

CHUNK_NBYTES = 16 << 20
"""Size of the float32 logits of a chunk. Several tensors of this size exist at a time."""


@dataclass(frozen=True, slots=True)
class SplitModel:
    """A causal model in two parts.

    Attributes:
        body: Maps token ids [B, L] to hidden states [B, L, H].
        head: Maps hidden states [P, H] to logits [P, V].
        vocabulary: Size of the vocabulary, V.
        chunk_nbytes: Size in bytes of the float32 logits of a chunk of positions.
    """

    body: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    vocabulary: int
    chunk_nbytes: int = CHUNK_NBYTES

    def chunks(self, n_positions: int) -> list[slice]:
        """Return the ranges of positions whose logits are computed together."""
        step = max(1, self.chunk_nbytes // (4 * self.vocabulary))
        return [slice(start, min(start + step, n_positions)) for start in range(0, n_positions, step)]


def split_head(model: PreTrainedModel) -> SplitModel:
    """Split a model into body and head.

    If the logits are not exactly the output layer's product (for example scaled or capped), the whole model becomes the
    body and the head returns its input. A run on four tokens determines which case applies.

    Raises:
        ArtifactError: The model cannot run.
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
        with torch.no_grad(), forward_errors(model):
            logits = whole(ids)
            split = base(input_ids=ids, use_cache=False)
            if hasattr(split, "last_hidden_state") and torch.equal(output(split.last_hidden_state), logits):
                return SplitModel(body, output, logits.shape[-1])
    return SplitModel(whole, lambda logits: logits, vocabulary)
