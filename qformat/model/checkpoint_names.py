"""Map tensor names in a checkpoint to names in the model. transformers renames or merges tensors of some models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


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
