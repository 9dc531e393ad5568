"""Ask transformers which rules apply when it loads a checkpoint: names, dtypes, tied and absent tensors.

A model must not depend on whether transformers or qformat loads it, so every rule is taken from transformers itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)

_ROTARY = "rotary_emb.inv_freq"
_POSITIONS = "position_ids"


def name_in_model(model: PreTrainedModel, present: dict[str, Any]) -> Callable[[str], tuple[str, bool]]:
    """Return a function that maps a tensor's name in a checkpoint to its name in the model.

    Args:
        model: Model on any device, including the meta device.
        present: State of the model by name, as `model.state_dict()` returns it.

    Returns:
        A function that takes a name in the checkpoint and returns the name in the model and whether transformers
        merges the tensor with others there.
    """
    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]

    def renamed(name: str) -> tuple[str, bool]:
        found, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, present)
        return found, merged is not None

    return renamed


def keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the tensors that transformers keeps in float32 that dtype.

    Args:
        model: Model on the meta device, changed in place.
        dtype: Dtype of the other floating-point tensors.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = build_glob_alternation(list(plan))[0]
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if tensor is None or not tensor.is_floating_point() or leaf in module._non_persistent_buffers_set:
                    continue
                if pattern.search(f"{prefix}.{leaf}"):
                    _in_float32(held, leaf, tensor)


def _in_float32(held: dict[str, Tensor | None] | dict[str, nn.Parameter | None], leaf: str, tensor: Tensor) -> None:
    value = tensor.detach().to(torch.float32)
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    held[leaf] = value  # type: ignore[assignment]


def tie_weights(model: PreTrainedModel, packed: Collection[str]) -> None:
    """Tie the weights that the config declares as tied, as transformers does.

    If the files have both weights, they are tied only if they are equal: merging an adapter of the output layer, for
    example, leaves a config that no longer applies. If they have one of the two, the other becomes that one.

    Args:
        model: Model with the tensors of the files; tensors that the files do not have are on the meta device.
        packed: Names of the packed weights in the model. A packed weight is not tied.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in packed or source in packed:
            del model.all_tied_weights_keys[target]
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    missing = {name for name in tied if model.get_parameter_or_buffer(name).is_meta}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def ignored_extras(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return those tensors without a place in the model that transformers ignores without a warning.

    Args:
        model: Model on any device.
        names: The model's names of the tensors.
    """
    buffers = [name for name, _ in model.named_buffers()]
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith(_ROTARY) for name in buffers):
        patterns.add(re.escape(_ROTARY))
    if any(name.endswith(_POSITIONS) for name in buffers):
        patterns.add(rf"(^|\.){_POSITIONS}$")
    return _matching(patterns, names)


def ignored_gaps(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return those tensors of a model that a checkpoint may lack: the model's own code initializes them.

    Args:
        model: Model on any device.
        names: Names of tensors in the model.
    """
    return _matching(model._keys_to_ignore_on_load_missing or (), names)


def _matching(patterns: Collection[str], names: Iterable[str]) -> set[str]:
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
