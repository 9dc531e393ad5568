"""A model without weights but for one decoder layer at a time, which transformers' own rules load."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from qformat.errors import ArtifactError, Reason, SourceError
from qformat.model.build import build_on_meta, initialise_the_rest, read_config
from qformat.names import CONFIG_NAME
from qformat.quality.calibration.layer_calls import LayerCall, UnsupportedModelError, record_calls

NEXT_STEP = "Convert it without calibration"

ReadTensor = Callable[[str], Tensor]
"""Returns a tensor of the source by its name there."""

Calls = Mapping[int, tuple[LayerCall, ...]]
"""How each layer is called, by the number of windows in a batch."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """The stack of layers inside a model, which is otherwise without weights.

    layer_tensors: for each layer the names in the source of its tensors. targets: for each layer the weights that are
    `nn.Linear` of it, by name in the source, and where they are in the layer. outside: other tensors that a run up to
    the first layer takes. elsewhere: weights asked for that are no Linear of a layer, and what they are.
    """

    path: Path
    model: PreTrainedModel
    stack: nn.Module
    layers: tuple[nn.Module, ...]
    layer_tensors: tuple[tuple[str, ...], ...]
    targets: tuple[Mapping[str, str], ...]
    outside: tuple[str, ...]
    elsewhere: Mapping[str, str]

    def linear(self, index: int, name: str) -> nn.Linear:
        """Return the layer's Linear whose weight has this name in the source."""
        module = self.layers[index].get_submodule(self.targets[index][name])
        assert isinstance(module, nn.Linear)
        return module

    def record(self, batches: Iterable[Tensor], *, read: ReadTensor, keep: Callable[[Tensor], None]) -> Calls:
        """Run batches of token ids [n, length] up to the first layer, and return how the layers are called.

        keep: takes the hidden states in front of the first layer, float32 [n, length, width], batch by batch.
        Raises SourceError for a model whose layers cannot be run one by one.
        """
        self._load(self.outside, read)
        calls: dict[int, tuple[LayerCall, ...]] = {}
        for ids in batches:
            try:
                run = record_calls(self.stack, self.layers, ids)
                first = calls.setdefault(len(ids), run.calls)
                if not all(one.equals(other) for one, other in zip(run.calls, first, strict=True)):
                    raise UnsupportedModelError("hands its layers more than hidden states that depend on the text")
            except UnsupportedModelError as reason:
                raise self._refused(f"{type(self.model).__name__} {reason}") from None
            keep(run.hidden)
        for child in self.stack.children():
            if not set(self.layers) <= set(child.children()):
                child.to("meta")
        return calls

    def load_layer(self, index: int, read: ReadTensor) -> nn.Module:
        """Give a layer its weights, in float32."""
        self._load(self.layer_tensors[index], read)
        layer = self.layers[index]
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if tensor.is_meta:
                raise self._refused(f"layer {index}: the model needs {name}, and the source has no such tensor")
        return layer

    def drop_layer(self, index: int) -> None:
        """Take a layer's weights away."""
        self.layers[index].to("meta")

    def _load(self, names: Iterable[str], read: ReadTensor) -> None:
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            found, _ = convert_and_load_state_dict_in_model(
                self.model,
                {name: read(name) for name in names},
                LoadStateDictConfig(
                    dtype=torch.float32,
                    device_map={"": "cpu"},
                    weight_mapping=get_model_conversion_mapping(self.model),  # type: ignore[arg-type]
                ),
            )
        finally:
            if shown:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if found.conversion_errors or found.mismatched_keys or found.error_msgs:
            wrong = [*found.conversion_errors, *map(str, found.mismatched_keys), *found.error_msgs]
            raise self._refused(f"transformers cannot load {wrong[0]}")

    def _refused(self, problem: str) -> SourceError:
        return SourceError(Reason.CONFIG_FIELD, self.path / CONFIG_NAME, problem, next_step=NEXT_STEP)


def build_decoder(path: Path, names: Sequence[str], packed: Collection[str]) -> Decoder:
    """Build the model that a folder's config.json names, without weights, and find its decoder layers.

    names: all tensors of the source; packed: those that are to be encoded.
    Raises: SourceError for an architecture that cannot be calibrated.
    """
    model = _build(path)
    renamed = _names_in_model(model, names)
    prefix = _find_layers(model, [renamed[name][0] for name in packed if not renamed[name][1]])
    if prefix is None:
        raise SourceError(
            Reason.CONFIG_FIELD,
            path / CONFIG_NAME,
            f"{type(model).__name__} has no list of layers with weights to encode in it",
            next_step=NEXT_STEP,
        )
    stack_name = prefix.rpartition(".")[0]
    stack, layers = model.get_submodule(stack_name), tuple(model.get_submodule(prefix).children())
    in_layer: list[list[str]] = [[] for _ in layers]
    targets: list[dict[str, str]] = [{} for _ in layers]
    outside, elsewhere = [], {}
    for name, (target, merged) in renamed.items():
        index, within = _place_in_layers(target, prefix)
        if index is not None and index < len(layers):
            in_layer[index].append(name)
        elif target.startswith(f"{stack_name}." if stack_name else ""):
            outside.append(name)
        if name in packed:
            module = None if merged else _module_at(model, target.removesuffix(".weight"))
            if index is not None and index < len(layers) and type(module) is nn.Linear:
                targets[index][name] = within.removesuffix(".weight")
            elif index is None and type(module) is nn.Linear:
                elsewhere[name] = "outside the decoder layers"
            else:
                elsewhere[name] = "no Linear in transformers' model"
    return Decoder(
        path=path,
        model=model,
        stack=stack,
        layers=layers,
        layer_tensors=tuple(map(tuple, in_layer)),
        targets=tuple(targets),
        outside=tuple(outside),
        elsewhere=elsewhere,
    )


def _build(path: Path) -> PreTrainedModel:
    try:
        config = read_config(path, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise SourceError(
                Reason.CONFIG_FIELD,
                path / CONFIG_NAME,
                "an encoder-decoder model: only the layers of decoders can be calibrated",
                next_step=NEXT_STEP,
            )
        model = build_on_meta(path, config, dtype=torch.float32, trust_remote_code=False, attention=None)
    except ArtifactError as error:
        raise SourceError(
            error.reason, error.path, error.problem, tensor=error.tensor, field=error.field, next_step=NEXT_STEP
        ) from error
    initialise_the_rest(model, torch.device("cpu"))
    return model.eval().requires_grad_(False)  # type: ignore[no-untyped-call,no-any-return]


def _names_in_model(model: PreTrainedModel, names: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Return for each tensor of the source its name in the model, and whether it is merged there with others."""
    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    present = model.state_dict()
    found = {}
    for name in names:
        renamed, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, present)
        found[name] = (name, False) if renamed not in present and name in present else (renamed, merged is not None)
    return found


def _find_layers(model: nn.Module, wanted: Collection[str]) -> str | None:
    """Return the path of the list of modules that has most of the weights, the outermost of equal ones."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    counts = {name: sum(weight.startswith(f"{name}.") for weight in wanted) for name in lists}
    return max((name for name in lists if counts[name]), key=lambda name: (counts[name], -len(name)), default=None)


def _place_in_layers(target: str, prefix: str) -> tuple[int | None, str]:
    """Return the layer of a tensor and its name in there."""
    if not target.startswith(f"{prefix}."):
        return None, target
    number, _, within = target.removeprefix(f"{prefix}.").partition(".")
    return (int(number), within) if number.isdecimal() else (None, target)


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
