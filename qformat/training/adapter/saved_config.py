"""Reads the adapter_config.json of an adapter that anybody may have written.

PEFT matches several fields as regular expressions against the names of the model's layers, and allocates what the rank
says. Here each field is checked first, and patterns are replaced by the names that they match (`saved_patterns`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from qformat import strict_json
from qformat.errors import AdapterError, ArtifactError, first_line
from qformat.named_files import read_named
from qformat.names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from qformat.training.adapter.saved_patterns import (
    as_patterns,
    ends_of,
    is_plain_name,
    matching,
    value_shown,
    values_by_name,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
"""What precedes the name of a layer in the names of an adapter's tensors."""

_MAX_NBYTES = 2**23
"""Largest size of adapter_config.json: 8 MiB, the indices of about a million trained tokens."""

_MAX_ITERATIONS = 100
"""Largest number of iterations in `init_lora_weights: pissa_niter_N`. PEFT's documentation uses 16."""

_MAX_LAYERS = 10_000

_ALL_LINEAR = "all-linear"


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_names_or_pattern(value: Any) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_plain(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return _is_names(names) and all(map(is_plain_name, names))


def _is_initialization(value: Any) -> bool:
    _name, _, iterations = str(value).partition("_niter_")
    few = not iterations or (iterations.isdecimal() and len(iterations) < 4 and int(iterations) <= _MAX_ITERATIONS)
    return isinstance(value, bool) or (isinstance(value, str) and few)


def _is_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) <= _MAX_LAYERS and all(type(number) is int for number in numbers)


def _maps_to(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to 1"),
    "rank_pattern": (_maps_to(_is_rank), "positive integers by pattern"),
    "alpha_pattern": (_maps_to(_is_number), "numbers by pattern"),
    "target_modules": (_is_names_or_pattern, "a pattern or a list of names"),
    "exclude_modules": (_is_names_or_pattern, "a pattern or a list of names"),
    "modules_to_save": (lambda value: _is_names(value) and _is_plain(value), "a list of plain names"),
    "layers_to_transform": (_is_layers, f"the number of a layer, or at most {_MAX_LAYERS} numbers"),
    "layers_pattern": (_is_plain, "a plain name or a list of plain names"),
    "init_lora_weights": (_is_initialization, f"a name, with at most {_MAX_ITERATIONS} iterations"),
}
"""Check of each field that is used here or that PEFT does not check, and what the field must be."""

_MAY_BE_NULL = {"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}

_UNSUPPORTED = (
    *("megatron_config", "layer_replication", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora"),
    *("target_parameters", "velora_config"),
)
"""Fields of variants that import packages by name, change the base model, or allocate what they say."""


def read_saved_config(adapter: Path) -> LoraConfig:
    """Read and check the config of a saved adapter.

    Args:
        adapter: Directory of the adapter.

    Raises:
        AdapterError: The config is missing or damaged, has a value that is not allowed, or is for another method.
    """
    path = adapter / ADAPTER_CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"{adapter}: is not a PEFT adapter: {ADAPTER_CONFIG_NAME} does not exist. Check the path")
    try:
        data = read_named(path, max_nbytes=_MAX_NBYTES)
        fields = strict_json.loads(data, path=path, max_nbytes=_MAX_NBYTES, error=ArtifactError, python_numbers=True)
    except ArtifactError as problem:
        raise AdapterError(f"{path}: cannot be read: {problem.problem}. Download or train the adapter again") from None
    except OSError as problem:
        raise AdapterError(f"{path}: cannot be read: {problem.strerror}") from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{path}: is not a JSON object. Download or train the adapter again")
    _check_fields(fields, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about fields of other versions and adapter types
            given = {field: value for field, value in fields.items() if field != "runtime_config"}
            config = PeftConfig.from_peft_type(**given)  # type: ignore[no-untyped-call]
    except Exception as problem:  # each method of PEFT checks its fields in its own way
        raise AdapterError(f"{path}: PEFT cannot read it: {first_line(problem)}") from problem
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"{path}: adapter type is not supported (found {config.peft_type}, expected LORA). Load it with PEFT"
        )
    return config


def _check_fields(fields: Mapping[str, Any], path: Path) -> None:
    if fields.get("peft_type") != "LORA":
        return  # refused with its name, once PEFT has read it
    for field in _UNSUPPORTED:
        if fields.get(field):
            raise AdapterError(f"{path}: field {field!r} is not supported. Load the adapter with PEFT")
    for field, (is_right, expected) in _RULES.items():
        value = fields.get(field)
        if (value is None and field in _MAY_BE_NULL) or field not in {*fields, "target_modules"}:
            continue
        if not is_right(value):
            raise AdapterError(
                f"{path}: field {field!r} is {value_shown(value)}, expected {expected}. "
                "Save the adapter again with PEFT"
            )


def fix_layers(config: LoraConfig, model: PreTrainedModel, weights: Mapping[str, Tensor], adapter: Path) -> None:
    """Replace the patterns in an adapter's config by the layers that they match, and check what PEFT will allocate.

    Args:
        config: Config from `read_saved_config`, changed in place.
        model: Base model without the adapter.
        weights: Tensors of the adapter by name.
        adapter: Directory of the adapter, for messages.

    Raises:
        AdapterError: A pattern is not valid or takes too long, or the matrices of a layer do not have the shapes that
            the config and the model imply.
    """
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    modules = dict(model.named_modules())
    path = adapter / ADAPTER_CONFIG_NAME
    if config.target_modules == _ALL_LINEAR:
        _maybe_include_all_linear_layers(config, model)
    ends = {end for name in modules for end in ends_of(name)}
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(wanted := getattr(config, field), str):
            setattr(config, field, matching(wanted, modules, path=path, field=field))
        elif wanted is not None:  # PEFT compares every entry with every layer
            setattr(config, field, [name for name in dict.fromkeys(wanted) if name in ends])
    targets = [name for name in modules if name and check_target_module_exists(config, name)]
    if not targets:
        raise AdapterError(f"{path}: names no layer of this model. Use the model that the adapter was trained on")
    _check_tokens(config, model, path)
    ranks = values_by_name(config.rank_pattern or {}, targets, path=path, field="rank_pattern")
    alphas = values_by_name(config.alpha_pattern or {}, targets, path=path, field="alpha_pattern")
    for name in targets:
        _check_matrices(name, modules[name], ranks.get(name, config.r), weights, adapter)
    config.rank_pattern, config.alpha_pattern = as_patterns(ranks), as_patterns(alphas)


def _check_tokens(config: LoraConfig, model: PreTrainedModel, path: Path) -> None:
    """Check the tokens whose embeddings the adapter brings."""
    n_rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    chosen = config.trainable_token_indices or []
    for tokens in chosen.values() if isinstance(chosen, dict) else [chosen]:
        if not all(type(token) is int and 0 <= token < n_rows for token in tokens) or len({*tokens}) < len(tokens):
            raise AdapterError(
                f"{path}: field 'trainable_token_indices': expected different tokens from 0 to {n_rows - 1}. Use the "
                "model that the adapter was trained on"
            )


def _check_matrices(name: str, layer: nn.Module, rank: int, weights: Mapping[str, Tensor], adapter: Path) -> None:
    """Check the shapes of a layer's two matrices before PEFT allocates them."""
    expected: dict[str, list[Any]]
    if isinstance(layer, nn.Embedding):
        expected = {
            "lora_embedding_A": [rank, layer.num_embeddings],
            "lora_embedding_B": [layer.embedding_dim, rank],
        }
    else:  # layers of other kinds, such as convolutions, have other sizes; PEFT checks them
        n_in, n_out = (getattr(layer, size, None) for size in ("in_features", "out_features"))
        expected = {"lora_A.weight": [rank, n_in], "lora_B.weight": [n_out, rank]}
    for end, want in expected.items():
        tensor = f"{PREFIX}{name}.{end}"
        have = list(weights[tensor].shape) if tensor in weights else None
        if have is None or [size if size is None else found for size, found in zip(want, have, strict=False)] != want:
            raise wrong_shape(tensor, have, want, adapter)


def wrong_shape(tensor: str, have: list[int] | None, want: list[int] | None, adapter: Path) -> AdapterError:
    """Return the error for a tensor of an adapter that does not fit the model.

    Args:
        tensor: Name of the tensor.
        have: Its shape in the file, None if the file does not have it.
        want: The shape that the model needs, None if the model has no place for it.
        adapter: Directory of the adapter.
    """
    found, expected = (shape if shape is not None else "nothing" for shape in (have, want))
    return AdapterError(
        f"{adapter / ADAPTER_WEIGHTS_NAME}: tensor {tensor!r}: the shape does not fit this model "
        f"(found {found}, expected {expected}). Use the model that the adapter was trained on"
    )
