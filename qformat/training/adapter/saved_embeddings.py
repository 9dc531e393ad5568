"""Embeddings and output layers that an adapter brings along.

PEFT saves them if an adapter trains them (LoRA on `lm_head` or `embed_tokens`), or if the model was resized for new
tokens. They are the weights that the adapter was trained with, so they replace those of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qformat.errors import AdapterError
from qformat.model.nf4_linear import NF4Linear
from qformat.names import ADAPTER_WEIGHTS_NAME
from qformat.training.adapter.saved_config import PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHOLE = (".weight", ".base_layer.weight", ".modules_to_save.weight", ".token_adapter.base_layer.weight")
"""What follows the name of a layer whose whole weight is stored."""


def resize_embeddings(model: PreTrainedModel, weights: Mapping[str, Tensor], adapter: Path) -> None:
    """Give a model as many tokens as the embeddings in an adapter have. The adapter's values are not loaded yet.

    Args:
        model: Base model without the adapter, changed in place.
        weights: Tensors of the adapter by name.
        adapter: Directory of the adapter, for messages.

    Raises:
        AdapterError: The adapter brings an output layer, but that of the model is packed. Or the adapter lacks the
            embeddings of a resized model.
    """
    layers = _embedding_layers(model)
    stored = {path: rows for path in layers if (rows := _stored_rows(path, weights)) is not None}
    for path in stored:
        if isinstance(layers[path], NF4Linear):
            raise AdapterError(
                f"{adapter / ADAPTER_WEIGHTS_NAME}: brings 16-bit weights of {path!r}, which has 4-bit weights in this "
                "model. Convert the 16-bit model: qformat convert keeps this layer in 16 bit"
            )
    wanted = set(stored.values()) or _trained_rows(layers, weights)
    present = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    if wanted <= {present}:
        return
    (n_tokens, *others) = sorted(wanted)
    if others or stored.keys() != layers.keys():
        raise AdapterError(
            f"{adapter / ADAPTER_WEIGHTS_NAME}: was trained on a model that was resized to {n_tokens} tokens (this one "
            f"has {present}), but does not have the embeddings of the new tokens. Save the adapter again with "
            "save_embedding_layers=True"
        )
    model.resize_token_embeddings(n_tokens, mean_resizing=False)


def _embedding_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    return {name: module for name, module in model.named_modules() if any(module is end for end in ends)}


def _stored_rows(path: str, weights: Mapping[str, Tensor]) -> int | None:
    found = (weights.get(f"{PREFIX}{path}{end}") for end in _WHOLE)
    return next((int(tensor.shape[0]) for tensor in found if tensor is not None), None)


def _trained_rows(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> set[int]:
    """Return the numbers of tokens that LoRA matrices of the layers are made for."""
    rows = set()
    for path in layers:
        if (of_output := weights.get(f"{PREFIX}{path}.lora_B.weight")) is not None:
            rows.add(int(of_output.shape[0]))
        if (of_input := weights.get(f"{PREFIX}{path}.lora_embedding_A")) is not None:
            rows.add(int(of_input.shape[1]))
    return rows
