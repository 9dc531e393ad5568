"""Code that config.json may ask for: only implementations that are part of transformers and of installed packages.

transformers takes `attn_implementation: "owner/kernel"` from the file, and fetches native code of that name from the
Hub where the package `kernels` is installed. It does the same for names of packages that are not installed. Only the
caller may ask for such code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from qformat.errors import ArtifactError, Reason
from qformat.names import CONFIG_NAME

ATTENTION = frozenset({"eager", "sdpa", "flex_attention", "paged|eager"})
"""Implementations of attention that need only torch and transformers."""

EXPERTS = frozenset({"eager", "batched_mm", "grouped_mm"})
"""Implementations of experts that need only torch and transformers. The others of transformers are on the Hub."""

_FIELDS = ("attn_implementation", "experts_implementation")


def check_named_code(config: PretrainedConfig, model_class: type, path: Path, *, attention: str | None) -> None:
    """Check that no part of a model's config names an implementation that transformers would fetch.

    Args:
        config: Config of the model, with the caller's choice of attention.
        model_class: Class of the model.
        path: Directory of the model, for messages.
        attention: Implementation of attention that the caller chose, or None.

    Raises:
        ArtifactError: The config names another implementation.
    """
    for field, name in _named(config, ""):
        if not _is_allowed(field, name, model_class, attention):
            raise ArtifactError(
                Reason.CONFIG_FIELD,
                path / CONFIG_NAME,
                f"names {name!r}, but a file may only name code that is part of transformers or of an installed "
                "package",
                field=field,
                next_step="Remove the field. For an artifact, run qformat seal afterwards. If you trust that code, "
                "name it yourself in Python: load_model(path, attention=...), or model.set_attn_implementation(...)",
            )


def _is_allowed(field: str, name: Any, model_class: type, attention: str | None) -> bool:
    if not isinstance(name, str):
        return False
    if field.endswith("experts_implementation"):
        return name in EXPERTS
    return name in ATTENTION or name == attention or name in _installed_flash(model_class)


def _installed_flash(model_class: type) -> set[str]:
    """Return the names of flash attention for which transformers would use an installed package, not the Hub."""
    suited = getattr(model_class, "_compatible_flash_implementations", None)
    named = {f"flash_attention_{version}": facts for version, facts in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()}
    available = {name for name, facts in named.items() if facts["general_availability_check"]()}
    return available & set(suited) if suited else available


def _named(part: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield the implementations that a config and its parts name, with the field of each."""
    if isinstance(part, PretrainedConfig):
        for field in _FIELDS:
            yield from _values(getattr(part, f"_{field}", None), place + field)
        part = part.__dict__
    elif isinstance(part, Mapping):
        for key, value in part.items():
            field = str(key).removeprefix("_").removesuffix("_internal")
            if field in _FIELDS:
                yield from _values(value, place + field)
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield from _named(value, f"{place}{key}.")
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _named(value, place)


def _values(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the implementations in a value, which is one for all parts of the model, or one for each."""
    for name in value.values() if isinstance(value, Mapping) else [value]:
        if name is not None:
            yield field, name
