"""The model class of a checkpoint whose config.json names none, from the table of transformers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.errors import Reason, SourceError, install_extra
from qformat.names import CONFIG_NAME

FIELD = "architectures"


def with_architectures(config: JsonObject, names: Collection[str], path: Path) -> tuple[JsonObject, str | None]:
    """Return a config that names its model class, which readers such as vLLM need, and a note if it did not.

    That is the language model that transformers has for the `model_type`, or its base model without a head, if the
    names of the tensors are those of the base model. A config that refers to code of its own is returned as it is: that
    code names the class.

    Args:
        config: Contents of config.json.
        names: Names of the tensors.
        path: Location of the checkpoint, for messages.

    Raises:
        SourceError: The config names no model class, and transformers knows none for its `model_type`.
    """
    if config.get(FIELD) or config.get("auto_map"):
        return config, None
    model_type = config.get("model_type")
    try:
        found = _class_of(model_type, names) if isinstance(model_type, str) else None
    except ImportError:
        why = "transformers, which knows the class of each model_type, is not installed"
        raise _unknown(path, why, f"{install_extra('models')}, or add {_EXAMPLE}") from None
    if found is None:
        why = f"transformers knows no language model of model_type {model_type!r}"
        raise _unknown(path, why, f"Add the name of the model class, such as {_EXAMPLE}")
    name, kind = found
    note = f"{CONFIG_NAME} has no {FIELD!r}: the artifact names {name}, the {kind} of {model_type!r}"
    return {**config, FIELD: [name]}, note


def _class_of(model_type: str, names: Collection[str]) -> tuple[str, str] | None:
    """Return the name of the class and what it is, or None if transformers knows none."""
    import transformers
    from transformers.models.auto import modeling_auto

    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)
    model = masked or modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if model is None:
        return None
    name = _first(model)
    prefix = f"{getattr(transformers, name).base_model_prefix}."
    base = modeling_auto.MODEL_MAPPING_NAMES.get(model_type)
    if base is not None and not any(tensor.startswith(prefix) for tensor in names):
        return _first(base), "base model"
    return name, "causal language model" if masked is None else "masked language model"


def _first(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else names[0]


_EXAMPLE = f'"{FIELD}": ["LlamaForCausalLM"]'


def _unknown(path: Path, why: str, next_step: str) -> SourceError:
    return SourceError(
        Reason.CONFIG_FIELD, path / CONFIG_NAME, f"is missing, and {why}", field=FIELD, next_step=next_step
    )
