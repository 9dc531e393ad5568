"""The model class of a checkpoint whose config.json names none, from the table of transformers."""

from __future__ import annotations

from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.errors import Reason, SourceError, install_extra
from qformat.names import CONFIG_NAME

FIELD = "architectures"


def with_architectures(config: JsonObject, path: Path) -> tuple[JsonObject, str | None]:
    """Return a config that names its model class, which readers such as vLLM need, and a note if it did not.

    A config that refers to code of its own is returned as it is: that code names the class.

    Args:
        config: Contents of config.json.
        path: Location of the checkpoint, for messages.

    Raises:
        SourceError: The config names no model class, and transformers knows none for its `model_type`.
    """
    if config.get(FIELD) or config.get("auto_map"):
        return config, None
    model_type = config.get("model_type")
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        why = "transformers, which knows the class of each model_type, is not installed"
        raise _unknown(path, why, f"{install_extra('models')}, or add {_EXAMPLE}") from None
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        why = f"transformers knows no causal language model of model_type {model_type!r}"
        raise _unknown(path, why, f"Add the name of the model class, such as {_EXAMPLE}")
    name = found if isinstance(found, str) else found[0]
    note = f"{CONFIG_NAME} has no {FIELD!r}: the artifact names {name}, the causal language model of {model_type!r}"
    return {**config, FIELD: [name]}, note


_EXAMPLE = f'"{FIELD}": ["LlamaForCausalLM"]'


def _unknown(path: Path, why: str, next_step: str) -> SourceError:
    return SourceError(
        Reason.CONFIG_FIELD, path / CONFIG_NAME, f"is missing, and {why}", field=FIELD, next_step=next_step
    )
