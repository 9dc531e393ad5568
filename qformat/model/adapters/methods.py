"""Refuse PEFT's methods that do not work on packed layers, when PEFT has wrapped the layers and before anything runs.

Without the check these methods fail at the first forward pass, or compute with factors that were cut to bytes. Methods
that fail while PEFT wraps the first layer never get here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from qformat.errors import UsageError
from qformat.model.nf4_linear import NF4Linear

_FACTOR_SHAPES = "it takes the shape of its factors from the stored weight"
_ADDS = "it adds to single elements of the stored weight"

_REASONS = {
    "LOHA": _FACTOR_SHAPES,
    "LOKR": _FACTOR_SHAPES,
    "HRA": "it rotates the stored weight",
    "HIRA": "it multiplies the stored weight by its factors",
    "PEANUT": "it passes the stored weight through a network",
    "SHIRA": _ADDS,
    "SUPERTUNING": _ADDS,
}
"""PEFT's types that compute with `weight` as a matrix, which it is not in a packed layer."""


def check_adapters(model: nn.Module, configs: Mapping[str, Any], checked: dict[str, Any]) -> None:
    """Check the layers that PEFT has wrapped. This costs nothing if all adapters have been checked before.

    Args:
        model: Model to which PEFT attaches adapters.
        configs: PEFT's config of each adapter.
        checked: The configs of the adapters that the layers had at the last check. Updated.

    Raises:
        UsageError: The method of an adapter does not work on packed layers.
    """
    if all(checked.get(name) is config for name, config in configs.items()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    attached: set[str] = set()
    for name, layer in nn.Module.named_modules(model):
        if isinstance(layer, BaseTunerLayer):
            attached.update(*(getattr(layer, held, ()) for held in layer.adapter_layer_names))
            if isinstance(layer.get_base_layer(), NF4Linear):
                _check_layer(name, layer, configs)
    checked.clear()
    checked.update((name, config) for name, config in configs.items() if name in attached)


def _check_layer(name: str, layer: Any, configs: Mapping[str, Any]) -> None:
    from peft import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.lora.layer import ParamWrapper

    if isinstance(layer, ParamWrapper):
        raise _unsuitable("target_parameters", name, "it replaces the stored weight by a matrix")
    for config in configs.values():
        reason = _REASONS.get(config.peft_type.value)
        tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        if tuner is not None and isinstance(layer, tuner.tuner_layer_cls):
            method = type(config).__name__
            if reason is not None:
                raise _unsuitable(method, name, reason)
            for own, tensor in _own_tensors(layer):
                if tensor.dtype == layer.get_base_layer().weight.dtype:
                    raise _unsuitable(f"{method} ({own.split('.')[0]})", name, "PEFT keeps its factors as bytes")


def _own_tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that PEFT has added to a layer."""
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from chain(child.named_parameters(name), child.named_buffers(name))


def _unsuitable(method: str, layer: str, reason: str) -> UsageError:
    return UsageError(
        f"{method} does not work on 4-bit weights such as {layer!r}: {reason}. Load the model again and use LoRA, "
        "DoRA, IA3, OFT or another method that works, or use the 16-bit model (qformat export ART OUT --to bf16)"
    )
