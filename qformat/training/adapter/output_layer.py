"""Decodes a packed output layer for training, because the loss of trl multiplies by its weight tile by tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qformat.model.nf4_linear import NF4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decode_output_layer(model: PreTrainedModel) -> bool:
    """Decode a packed output layer to bf16 in place. Return whether it was packed."""
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(output, NF4Linear):
        return False
    plain = nn.Linear(output.in_features, output.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(output.dequantize(torch.bfloat16), requires_grad=False)
    plain.bias = output.bias
    model.set_output_embeddings(plain)  # type: ignore[no-untyped-call]
    return True
