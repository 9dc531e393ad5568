"""Refuse to merge adapters into 4-bit weights, before PEFT has changed any layer.

PEFT merges layer by layer, in the order of the modules. An embedding that was kept in 16 bit comes before the first
packed layer, so an error in the packed layer is too late. PEFT has no hook that it calls before the first layer, but it
iterates over the modules of the model, and `LoadedModel.named_modules` passes through `refusing_to_merge`. This acts on
the layers of one model; PEFT's classes stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from torch import nn

from qformat.errors import UsageError
from qformat.model.nf4_linear import NF4Linear

_WRAPPED = {"base_layer", "original_module"}
"""Names under which PEFT's layers and wrappers hold the layer that they replace."""


def refusing_to_merge(model: nn.Module, modules: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules, and call `refuse_merging` before the first one that PEFT has put in place of another.

    An iteration that stops earlier costs nothing: `model.device` looks at the first parameter only.

    Args:
        model: Model to which PEFT has attached adapters.
        modules: Modules of the model with their names.
    """
    checked = False
    for name, module in modules:
        if not checked and not _WRAPPED.isdisjoint(module._modules):
            refuse_merging(model)
            checked = True
        yield name, module


def refuse_merging(model: nn.Module) -> None:
    """Let every adapted layer of a model refuse to merge if any of them is packed, and let them all merge otherwise.

    Removing adapters (`unload`) still works.

    Args:
        model: Model to which PEFT has attached adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    modules = [module for _, module in nn.Module.named_modules(model)]
    adapted: list[Any] = [module for module in modules if isinstance(module, BaseTunerLayer)]
    refused = any(isinstance(layer.get_base_layer(), NF4Linear) and _has_adapters(layer) for layer in adapted)
    for layer in adapted:
        _replace_method(layer, "merge", refuse if refused else None)
    for wrapper in modules:
        if isinstance(wrapper, ModulesToSaveWrapper):
            # The method of the class only looks up which module to put in the wrapper's place.
            unloaded = ModulesToSaveWrapper.unload_and_optionally_merge_module(wrapper, False, False, None)
            method = partial(_unload_only, unloaded) if refused else None
            _replace_method(wrapper, "unload_and_optionally_merge_module", method)


def refuse(*_args: Any, **_options: Any) -> NoReturn:
    """Take the place of the method `merge` of an adapted layer.

    Raises:
        UsageError: Always. The message says how to merge instead.
    """
    raise UsageError(
        "an adapter cannot be merged into 4-bit weights. Export the artifact to 16 bit (qformat export ART OUT --to "
        "bf16), load the adapter on the exported model and merge it there"
    )


def _unload_only(unloaded: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    if merge:
        refuse(safe_merge, adapter_names)
    return unloaded


def _has_adapters(layer: Any) -> bool:
    return any(len(getattr(layer, name, ())) > 0 for name in layer.adapter_layer_names)


def _replace_method(module: nn.Module, name: str, method: Any) -> None:
    """Put a function into the module's own attributes, where `copy` and `pickle` find it, or take it out again."""
    if method is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = method
