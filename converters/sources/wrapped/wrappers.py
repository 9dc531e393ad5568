"""Parts of names that belong to no model: wrappers put them there, and no reader looks for them.

_orig_mod.                   torch.compile
_fsdp_wrapped_module.        FSDP
_checkpoint_wrapped_module.  activation checkpointing
_forward_module.             Lightning and DeepSpeed
module.                      DistributedDataParallel, DeepSpeed; only in front of every name
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_IN_FRONT = "module"
_OF_ADAPTERS = ("base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save")
_IN_FRONT_OF_ADAPTERS = "base_model.model."


def wrapper_parts(names: Collection[str]) -> list[str]:
    """Return the parts of names that wrappers put there; `module` only if every name begins with it."""
    text = f".{'.'.join(names)}."
    found = [part for part in _INSIDE if f".{part}." in text]
    if names and all(without(name, found).startswith(f"{_IN_FRONT}.") for name in names):
        found.append(_IN_FRONT)
    return found


def without(name: str, parts: Sequence[str]) -> str:
    """Return a name without the parts of wrappers.

    Args:
        name: Name of a tensor.
        parts: Result of `wrapper_parts` for all names.
    """
    kept = [part for part in name.split(".") if part == _IN_FRONT or part not in parts]
    while _IN_FRONT in parts and kept[0] == _IN_FRONT:
        kept = kept[1:]
    return ".".join(kept)


def of_unmerged_adapter(names: Collection[str], *, has_own_adapters: bool) -> str | None:
    """Return the first name that PEFT gives to a tensor of a model with an adapter that is not merged, or None.

    Args:
        names: Names of all tensors.
        has_own_adapters: Whether the architecture itself has tensors under the names of LoRA, as Phi-4 multimodal.
    """
    text = f".{'.'.join(names)}."
    inside = () if has_own_adapters else tuple(f".{part}." for part in _OF_ADAPTERS if f".{part}." in text)
    for name in names:
        if name.startswith(_IN_FRONT_OF_ADAPTERS) or any(part in name for part in inside):
            return name
    return None
