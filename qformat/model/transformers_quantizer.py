"""Let transformers' `from_pretrained` load NF4 weights with qformat's layers on the mapped file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer

from qformat.artifact.components import Component
from qformat.artifact.reading.reader import MappedShards
from qformat.errors import DeviceMemoryError, UsageError
from qformat.model.build import linear_at, names_in_model, replace_linear
from qformat.model.load import open_shards
from qformat.model.loaded_model import Origin, adopt
from qformat.model.memory import free_nbytes
from qformat.model.rules.loading_rules import ignored_extras
from qformat.model.rules.named_code import check_named_code
from qformat.model.shard_tensors import PackedComponents, map_shards, tensors_of
from qformat.sizes import format_nbytes

METHOD = "bitsandbytes_4bit"
"""Name of the quantization method in transformers."""


def register() -> None:
    """Let transformers' `from_pretrained` load NF4 weights with qformat instead of bitsandbytes.

    This applies to directories and Hub repositories that qformat or bitsandbytes wrote. bitsandbytes still loads FP4
    weights, and still quantizes 16-bit models while loading them. The registration lasts as long as the process;
    another call has no effect.
    """
    registered: type[HfQuantizer] = AUTO_QUANTIZER_MAPPING[METHOD]  # type: ignore[assignment]
    if issubclass(registered, NF4Quantizer):
        return
    NF4Quantizer.replaced = registered
    # transformers registers a name only once, so the name must be free.
    del AUTO_QUANTIZER_MAPPING[METHOD]
    register_quantizer(METHOD)(NF4Quantizer)


class NF4Quantizer(HfQuantizer):  # type: ignore[misc,no-any-unimported,unused-ignore]
    """Quantizer that attaches packed weights as views of the files after transformers has loaded the kept tensors."""

    replaced: type[HfQuantizer]
    """The quantizer that was registered before. It still handles everything except stored NF4 weights."""

    requires_calibration = False

    def __new__(cls, quantization_config: Any, **options: Any) -> Any:
        """Make this quantizer for stored NF4 weights, and the replaced one for any other configuration."""
        if options.get("pre_quantized", True) and quantization_config.bnb_4bit_quant_type == "nf4":
            return super().__new__(cls)
        return cls.replaced(quantization_config, **options)

    def __getnewargs__(self) -> tuple[Any]:
        """Return the argument of `__new__`, so that the quantizer is copied and pickled with its model."""
        return (self.quantization_config,)

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._loading: _Loading | None = None

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any]:
        """Return the caller's device map. Default: the current GPU, or the CPU if there is none."""
        if device_map is None:
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return the config, unless it names code that transformers would fetch, even if the caller named it.

        Args:
            config: Config of the model that is about to be built.

        Raises:
            ArtifactError: It names such code.
        """
        check_named_code(config, PreTrainedModel, Path(config.name_or_path or ""), attention=None)
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        device_map: dict[str, Any] | str | None = None,
        **_: object,
    ) -> None:
        _check_not_offloaded(device_map if isinstance(device_map, dict) else {})
        if not checkpoint_files:
            raise ValueError("qformat needs the checkpoint's files: pass a directory or a repository, not a state_dict")
        path = Path(checkpoint_files[0]).parent
        shards = open_shards(path)
        tensors = tensors_of(shards, map_shards(shards))
        names = names_in_model(model, tensors, path)
        present = model.state_dict()
        every = {names[name]: packed for name, packed in tensors.items() if isinstance(packed, PackedComponents)}
        skipped = ignored_extras(model, every.keys() - present.keys())
        loading = _Loading(
            shards,
            {name: renamed for name, renamed in names.items() if renamed in present},
            {name: packed for name, packed in every.items() if name not in skipped},
        )
        for name in loading.packed:
            loading.linears[name] = linear_at(model, name, path)
            model.set_submodule(name.removesuffix(".weight"), _OnlyBias(loading.linears[name]))
        ignored = model._keys_to_ignore_on_load_unexpected or []
        # A model without a head reports names as they are in the files.
        both = {*loading.packed, *(name for name, renamed in names.items() if renamed in loading.packed)}
        model._keys_to_ignore_on_load_unexpected = {*ignored, _component_pattern(both)}
        self._loading = loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        loading, self._loading = self._loading, None
        assert loading is not None
        path = loading.shards.path
        _check_not_offloaded(getattr(model, "hf_device_map", None) or {})
        _check_memory(model, loading.packed, path)
        for name, packed in loading.packed.items():
            module_name = name.removesuffix(".weight")
            linear = loading.linears[name]
            linear._parameters["bias"] = model.get_submodule(module_name)._parameters["bias"]
            model.set_submodule(module_name, linear)
            # transformers has already reported and initialised a bias that is missing from the files.
            replace_linear(model, name, packed, path, biases={f"{module_name}.bias"})
            model.get_submodule(module_name).to(_device_of(model, name))
        loading.shards.watch.check()
        adopt(model, Origin(loading.shards.layout, loading.names, loading.shards.watch))
        return model

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on the packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the operations work under torch.compile."""
        return True

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes the components unmodified."""
        return True


@dataclass(frozen=True, slots=True)
class _Loading:
    """What the quantizer keeps while transformers loads the kept tensors.

    Attributes:
        shards: Open shards.
        names: The model's name of each tensor in the files.
        packed: Packed weights by their names in the model.
        linears: Layers that placeholders replace, by the names of their weights.
    """

    shards: MappedShards
    names: dict[str, str]
    packed: dict[str, PackedComponents]
    linears: dict[str, nn.Linear] = field(default_factory=dict)


def _check_memory(model: PreTrainedModel, packed_weights: Mapping[str, PackedComponents], path: Path) -> None:
    """Raise an error if packed weights do not fit: transformers' "auto" does not count them."""
    needed: dict[torch.device, int] = {}
    for name, packed in packed_weights.items():
        device = _device_of(model, name)
        nbytes = sum(tensor.nbytes for tensor in packed.components.values())
        needed[device] = needed.get(device, 0) + nbytes
    for device, nbytes in needed.items():
        free = None if device.type == "cpu" else free_nbytes(device)
        if free is not None and nbytes > free:
            raise DeviceMemoryError(
                f"{path}: not enough memory on {device}: "
                f"the packed weights need {format_nbytes(nbytes, rounding='up')}, "
                f"{format_nbytes(free, rounding='down')} is free. "
                "Set the GPU of each layer in device_map, "
                "or use qformat.load_model(path, device_map='auto'), which keeps layers in host memory"
            )


def _check_not_offloaded(device_map: dict[str, Any]) -> None:
    """Raise an error if layers are to be offloaded: accelerate cannot move packed weights in and out correctly."""
    homes = {str(home) for home in device_map.values()}
    if "disk" in homes or ("cpu" in homes and len(homes) > 1):
        raise UsageError(
            "device_map: from_pretrained cannot keep packed layers in host memory or on disk. "
            "Use qformat.load_model(path, device='cuda', device_map='auto'), which streams them"
        )


class _OnlyBias(nn.Module):
    """Placeholder for a layer whose weight transformers must not load, because it would not map the file."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_parameter("bias", linear.bias)


def _component_pattern(packed: Iterable[str]) -> str:
    names = "|".join(re.escape(name) for name in sorted(packed))
    parts = "|".join(re.escape(part.value) for part in Component)
    return f"^(?:{names})(?:{parts})$"


def _device_of(model: nn.Module, name: str) -> torch.device:
    devices: dict[str, Any] = getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        prefix = ".".join(parts[:length])
        if prefix in devices:
            return torch.device(devices[prefix])
    return torch.device("cpu")
