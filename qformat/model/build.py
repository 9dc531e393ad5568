"""Build a transformers model around given tensors.

The model is made on the meta device, and an `NF4Linear` replaces each packed Linear. Nothing is copied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from qformat.artifact.reading.structure import ShardLayout
from qformat.errors import ArtifactError, Option, Reason
from qformat.model.boundary import config_errors, no_token_predictions
from qformat.model.nf4_linear import NF4Linear
from qformat.model.rules.config_values import check_values
from qformat.model.rules.loading_rules import ignored_extras, ignored_gaps, keep_in_float32, name_in_model, tie_weights
from qformat.model.rules.named_code import check_named_code
from qformat.model.rules.plausible_config import check_numbers
from qformat.model.shard_tensors import TORCH_DTYPES, PackedComponents, tensor_names
from qformat.names import CONFIG_NAME, INDEX_NAME

logger = logging.getLogger(__name__)

_UPDATE = ("Update transformers. If the model brings its own code and you trust it, pass ",
           Option("trust_remote_code", True))  # fmt: skip


def read_config(path: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """Read the config.json of a model.

    Args:
        path: Directory of the model.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        ArtifactError: A number in the file is implausible, transformers cannot read it, or does not know the
            architecture.
    """
    check_numbers(path)
    with config_errors(path, f"transformers {transformers.__version__} cannot read it", next_step=_UPDATE):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config


def check_predicts_tokens(path: Path, *, trust_remote_code: bool) -> None:
    """Check that a directory holds a model that predicts the next token, before anything is loaded or written.

    Model classes that come with the model are not checked: many do not declare what they can do.

    Args:
        path: Directory of the model.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        ArtifactError: transformers cannot read config.json or does not know the architecture.
        UsageError: The model has another task, such as the classification of texts.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    with config_errors(path, "names no model that transformers can build"):
        found = _model_class(path, config, trust_remote_code)
        if found.__module__.startswith("transformers.models.") and not found.can_generate():
            raise no_token_predictions(found, path)


def dtype_of(config: PretrainedConfig, layout: ShardLayout) -> torch.dtype:
    """Return the dtype in a model's config, or that of the first floating-point tensor if the config has none.

    Args:
        config: Config of the model.
        layout: Layout of the shards.

    Raises:
        ArtifactError: The dtype in the config is none that a model can compute in.
    """
    if isinstance(config.dtype, torch.dtype):
        if not config.dtype.is_floating_point or config.dtype.itemsize < 2:
            raise ArtifactError(
                Reason.CONFIG_FIELD,
                layout.path / CONFIG_NAME,
                f"is {config.dtype}, expected a floating-point dtype of at least 16 bits",
                field="dtype",
            )
        return config.dtype
    kept = (TORCH_DTYPES[layout.located[name].entry.dtype] for name in tensor_names(layout))
    return next((dtype for dtype in kept if dtype.is_floating_point and dtype.itemsize > 1), torch.bfloat16)


def build_on_meta(
    path: Path, config: PretrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool, attention: str | None
) -> PreTrainedModel:
    """Build the model that config.json describes on the meta device, without memory for its weights.

    Args:
        path: Directory of the model, for code that comes with it and for messages.
        config: Config of the model.
        dtype: Dtype of the floating-point tensors, except those that transformers keeps in float32.
        trust_remote_code: Whether to run Python code that comes with the model.
        attention: Name of a transformers attention implementation, or None for the default.

    Raises:
        ArtifactError: No model can be built from the config.
        UsageError: The model needs a package that is not installed.
    """
    with config_errors(path, "cannot build a model from it"):
        model_class = _model_class(path, config, trust_remote_code)
        if attention is not None:
            config._attn_implementation = attention
        check_values(config, path)
        check_named_code(config, model_class, path, attention=attention)
        with torch.device("meta"), no_init_weights():
            model = model_class._from_config(config, dtype=dtype)
    if not isinstance(model, PreTrainedModel):
        raise ArtifactError(
            Reason.CONFIG_FIELD, path / CONFIG_NAME, "is not a transformers model class", field="architectures"
        )
    keep_in_float32(model, dtype)
    return model


def attach(
    model: PreTrainedModel, tensors: Mapping[str, PackedComponents | Tensor], names: Mapping[str, str], path: Path
) -> dict[str, str]:
    """Attach all tensors to a model on the meta device; afterwards no tensor of the model is on the meta device.

    Args:
        model: Model from `build_on_meta`.
        tensors: Tensors by their names in the files.
        names: The model's name of each tensor, from `names_in_model`.
        path: Directory of the model, for messages.

    Returns:
        The entries of `names` that were attached. Kept tensors without a place in the model are skipped with a warning,
        as transformers does.

    Raises:
        ArtifactError: The model has no place for a packed weight, a shape differs, or a tensor is missing.
    """
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    device = next((t.device for t in tensors.values() if isinstance(t, Tensor)), torch.device("cpu"))
    places = tensors_by_name(model, persistent=True)
    skipped = _tensors_to_skip(model, tensors, places, path)
    biases = {name for name, tensor in tensors.items() if isinstance(tensor, Tensor) and name.endswith(".bias")}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and name not in skipped:
            _set_tensor(model, name, tensor, places[name], path)
    packed = {name for name, tensor in tensors.items() if isinstance(tensor, PackedComponents)} - skipped
    for name in sorted(packed):
        replace_linear(model, name, cast(PackedComponents, tensors[name]), path, biases)
    tie_weights(model, packed)
    initialise_the_rest(model, device, _gaps(model, path))
    return {name: renamed for name, renamed in names.items() if renamed not in skipped}


def _tensors_to_skip(
    model: PreTrainedModel, tensors: Mapping[str, PackedComponents | Tensor], places: Mapping[str, Tensor], path: Path
) -> set[str]:
    """Return the tensors that the model has no place for. transformers skips them, too, some with a warning.

    A packed weight is a layer that the converter knew, so without its layer the model would not be the same one.
    """
    extra = tensors.keys() - places.keys()
    if not extra:
        return set()
    unexpected = sorted(extra - ignored_extras(model, extra))
    for name in unexpected:
        if isinstance(tensors[name], PackedComponents):
            raise _does_not_fit(path, name, f"the model that {CONFIG_NAME} describes has no such layer")
    if unexpected:
        logger.warning(
            "%s: the model has no place for %d tensors of the files, which are not loaded: %s",
            path, len(unexpected), ", ".join(unexpected[:5]) + (", ..." if len(unexpected) > 5 else ""),
        )  # fmt: skip
    return extra


def _model_class(path: Path, config: PretrainedConfig, trust_remote_code: bool) -> Any:
    names = _strings(config, "architectures", path)
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = auto_map.get("AutoModelForCausalLM") or next(
            (value for key, value in auto_map.items() if key.startswith("AutoModel")), None
        )
        if reference is not None:
            return get_class_from_dynamic_module(reference, path)
    # Looking up other names of transformers would import what they need: the Trainer, for example, bitsandbytes.
    defined_in: Mapping[str, str] = vars(transformers)["_class_to_module"]
    for name in names:
        if ".modeling_" in defined_in.get(name, ""):
            return getattr(transformers, name)
    raise ArtifactError(
        Reason.CONFIG_FIELD,
        path / CONFIG_NAME,
        f"transformers {transformers.__version__} has no {' or '.join(map(repr, names)) or 'model of this name'}",
        field="architectures",
        next_step=_UPDATE,
    )


def _strings(config: PretrainedConfig, field: str, path: Path) -> list[str]:
    found = getattr(config, field, None) or []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise ArtifactError(Reason.CONFIG_FIELD, path / CONFIG_NAME, "is not a list of strings", field=field)
    return found


def names_in_model(model: PreTrainedModel, names: Iterable[str], path: Path) -> dict[str, str]:
    """Return the model's name of each tensor in a checkpoint; transformers renames tensors of some architectures.

    Args:
        model: Model on any device, including the meta device.
        names: Names in the checkpoint.
        path: Directory of the checkpoint, for messages.

    Returns:
        The name in the model by the name in the checkpoint.

    Raises:
        ArtifactError: transformers merges a tensor with others instead of only renaming it.
    """
    present = model.state_dict()
    rename = name_in_model(model, present)
    found = {}
    for name in names:
        renamed, merged = rename(name)
        if name in present and renamed not in present:
            renamed = name
        elif merged:
            raise _does_not_fit(path, name, f"transformers merges it into {renamed}; packed weights cannot be merged")
        found[name] = renamed
    return found


def linear_at(model: nn.Module, name: str, path: Path) -> nn.Linear:
    """Return the layer that owns a packed weight.

    Args:
        model: Model to look in.
        name: Name of the weight in the model, `LAYER.weight`.
        path: Directory of the model, for messages.

    Raises:
        ArtifactError: The model has no such layer, or the layer is not an `nn.Linear`.
    """
    try:
        module = model.get_submodule(name.removesuffix(".weight"))
    except AttributeError:
        raise _does_not_fit(path, name, f"the model that {CONFIG_NAME} describes has no such layer") from None
    if not isinstance(module, nn.Linear):
        raise _does_not_fit(
            path, name, f"is packed, but its layer in the model is a {type(module).__name__}, not a Linear"
        )
    return module


def replace_linear(model: nn.Module, name: str, packed: PackedComponents, path: Path, biases: set[str]) -> None:
    """Replace the layer of a packed weight with an `NF4Linear`.

    Args:
        model: Model to change in place.
        name: Name of the weight in the model, `LAYER.weight`.
        packed: Components of the weight.
        path: Directory of the model, for messages.
        biases: Names of all biases in the files.

    Raises:
        ArtifactError: The layer is missing, is not a Linear, has another shape, or its bias is missing.
    """
    old = linear_at(model, name, path)
    module_name = name.removesuffix(".weight")
    parent_name, _, child_name = module_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    shape = (old.out_features, old.in_features)
    if tuple(packed.state.shape) != shape:
        raise _does_not_fit(path, name, f"shape {list(packed.state.shape)}, but the model expects {list(shape)}")
    new = NF4Linear(old.in_features, old.out_features, packed.components, packed.state)
    if old.bias is not None:
        if f"{module_name}.bias" not in biases:
            raise _missing(path, f"{module_name}.bias")
        new.bias = old.bias
    new.train(old.training)
    setattr(parent, child_name, new)


def _set_tensor(model: nn.Module, name: str, tensor: Tensor, place: Tensor, path: Path) -> None:
    if tuple(tensor.shape) != tuple(place.shape):
        raise _does_not_fit(path, name, f"shape {list(tensor.shape)}, but the model expects {list(place.shape)}")
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    wanted = place.dtype if place.dtype.is_floating_point and tensor.dtype.is_floating_point else tensor.dtype
    value = tensor.to(wanted)
    if leaf in parent._parameters:
        # Integer parameters cannot have gradients.
        parent._parameters[leaf] = nn.Parameter(value, requires_grad=place.requires_grad and value.is_floating_point())
    else:
        parent._buffers[leaf] = value


def _gaps(model: PreTrainedModel, path: Path) -> list[str]:
    """Return the tensors that the files do not have and that the model's own code initializes."""
    if not any(tensor.is_meta for tensors in _tensors_by_module(model, persistent=True) for tensor in tensors):
        return []
    absent = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    gaps = ignored_gaps(model, absent)
    for name in absent:
        if name not in gaps:
            raise _missing(path, name)
    return sorted(gaps)


def initialise_the_rest(model: PreTrainedModel, device: torch.device, gaps: Iterable[str] = ()) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies, with the model's own code.

    Args:
        model: Model whose other tensors are attached.
        device: Device of the buffers.
        gaps: Names of parameters to compute as well.
    """
    for tensors in _tensors_by_module(model, persistent=False):
        for tensor in tensors:
            tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
    for path in gaps:
        parent, _, leaf = path.rpartition(".")
        parameters = model.get_submodule(parent)._parameters
        if (gap := parameters.get(leaf)) is not None:
            empty = torch.empty_like(gap, device=device)
            parameters[leaf] = nn.Parameter(empty, requires_grad=gap.requires_grad)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        if isinstance(module, NF4Linear):
            module._is_hf_initialized = True  # type: ignore[assignment]
    model.initialize_weights()  # type: ignore[no-untyped-call]


def tensors_by_name(model: nn.Module, *, persistent: bool = False) -> dict[str, Tensor]:
    """Return all parameters and buffers, tied ones under each of their names.

    torch's own iterators take several times as long.

    Args:
        model: Model on any device.
        persistent: Whether to leave out buffers that are not part of the model's state.
    """
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and not (persistent and name in module._non_persistent_buffers_set)
    }


def _tensors_by_module(model: nn.Module, *, persistent: bool) -> Iterator[list[Tensor]]:
    """Yield the tensors of each module. `parameters()` and `buffers()` of torch take far longer.

    With `persistent`, leave out buffers that are not part of the module's state.
    """
    for module in model.modules():
        left_out = module._non_persistent_buffers_set if persistent else ()
        buffers = [buffer for name, buffer in module._buffers.items() if name not in left_out]
        yield [tensor for tensor in (*module._parameters.values(), *buffers) if tensor is not None]


def _missing(path: Path, name: str) -> ArtifactError:
    return ArtifactError(
        Reason.MISSING_COMPONENT,
        path / INDEX_NAME,
        f"the model that {CONFIG_NAME} describes needs it, but no shard has it",
        tensor=name,
        next_step=f"{CONFIG_NAME} and the shards belong to different models, or a file of the source was left out",
    )


def _does_not_fit(path: Path, name: str, problem: str) -> ArtifactError:
    return ArtifactError(
        Reason.CONFIG_FIELD,
        path / CONFIG_NAME,
        problem,
        tensor=name,
        next_step=f"{CONFIG_NAME} and the shards belong to different models, or transformers renames the tensors",
    )
