"""Every model type that the installed transformers can build, on the meta device with two layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from qformat.artifact.tensor_spec import TensorSpec
from qformat.converters.rules.rules import module_path

N_LAYERS = 2

# Types whose default config lacks something that the model needs.
CONFIG_FIELDS: dict[str, dict[str, object]] = {
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "ministral": {"head_dim": 64},
    "nemotron": {"head_dim": 64, "num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}

# Types whose names on disk cannot be determined, so that nothing can be checked.
NOT_COMPARABLE = {
    "shieldgemma2": "a classifier around a whole model, which is not saved under the Hub's names",
    "vision-encoder-decoder": "a pair of any two models, whose own renamings transformers does not revert",
}

BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Built:
    """One model type, as transformers sees it."""

    name: str
    config: dict[str, object]
    model: transformers.PreTrainedModel
    tensors: list[TensorSpec]  # as on disk
    memory_name: dict[str, str]  # tensor on disk -> parameter in memory
    converted: frozenset[str]  # tensors that are more than renamed while they are loaded

    def module_of(self, tensor: str) -> str:
        return module_path(self.memory_name[tensor])

    def linear_modules(self) -> set[str]:
        """Return the modules that the bitsandbytes integration replaces unless they are skipped."""
        return {
            name
            for name, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, Conv1D) or type(module) is torch.nn.Linear
        }


def cut_layers(config: Any, depth: int = 0) -> None:
    for field in (
        *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"),
        *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
    ):
        if field in vars(config) and isinstance(vars(config)[field], int):
            setattr(config, field, min(getattr(config, field), N_LAYERS))
    for field in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, min(getattr(config, field), 1))
    if depth < 3:
        for value in list(vars(config).values()):
            if isinstance(value, transformers.PreTrainedConfig):
                cut_layers(value, depth + 1)


def build(name: str, auto_class: Any) -> Built | None:
    """Build a type on the meta device, or return None if its default config does not describe a model."""
    try:
        config = transformers.AutoConfig.for_model(name, **CONFIG_FIELDS.get(name, {}))
        cut_layers(config)
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except BUILD_ERRORS:
        return None
    state = model.state_dict()
    disk = revert_weight_conversion(model, {k: v for k, v in state.items() if k not in model.all_tied_weights_keys})
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    forward = {key: rename_source_key(key, renamings, converters, model.base_model_prefix, state) for key in disk}
    return Built(
        name,
        config.to_dict(),
        model,
        [TensorSpec(key, "BF16", tuple(tensor.shape)) for key, tensor in disk.items()],
        {key: renamed for key, (renamed, _) in forward.items()},
        frozenset(key for key, (_, converter) in forward.items() if converter is not None),
    )
