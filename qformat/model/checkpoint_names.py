"""What transformers calls a checkpoint's tensors in the model: it renames or merges those of some architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def name_in_model(model: PreTrainedModel, present: dict[str, Any]) -> Callable[[str], tuple[str, bool]]:
    """Return a function from a tensor's name in a checkpoint to that in the model, and whether it is merged there.

    present: the model's state by name.
    """
    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]

    def renamed(name: str) -> tuple[str, bool]:
        found, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, present)
        return found, merged is not None

    return renamed
