"""A model that has the weights of only one decoder layer at a time, loaded by transformers' own rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from qformat.errors import ArtifactError, Reason, SourceError
from qformat.model.build import build_on_meta, initialise_the_rest, read_config
from qformat.model.rules.loading_rules import name_in_model
from qformat.names import CONFIG_NAME
from qformat.quality.calibration.layer_calls import LayerCall, UnsupportedModelError, record_calls

NEXT_STEP = "Convert it without calibration"

ReadTensor = Callable[[str], Tensor]
"""Returns a tensor of the source by its name."""

Calls = Mapping[int, tuple[LayerCall, ...]]
"""How each layer is called, keyed by the number of windows in a batch."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """The decoder layers of a model that otherwise has no weights.

    Attributes:
        path: Directory of the source.
        model: The model.
        stack: The module that contains the layers and calls them.
        layers: The decoder layers in order.
        layer_tensors: Names in the source of each layer's tensors.
        targets: For each layer, the weights of its `nn.Linear` modules by name in the source, and the paths of these
            modules in the layer.
        outside: Names in the source of other tensors that are needed to run up to the first layer.
        elsewhere: Weights to encode that do not belong to a Linear of a layer, and why not.
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
        """Return the layer's Linear whose weight has this name in the source.

        Args:
            index: Index of the layer.
            name: Name of the weight in the source.
        """
        module = self.layers[index].get_submodule(self.targets[index][name])
        assert isinstance(module, nn.Linear)
        return module

    def record(self, batches: Iterable[Tensor], *, read: ReadTensor, keep: Callable[[Tensor], None]) -> Calls:
        """Run batches of token ids up to the first layer and return how the layers are called.

        Args:
            batches: Token ids, each [n, length].
            read: Returns a tensor of the source by its name.
            keep: Called for each batch with the hidden states before the first layer, float32 [n, length, width].

        Raises:
            SourceError: The layers cannot be run one by one.
        """
        self._load(self.outside, read)
        calls: dict[int, tuple[LayerCall, ...]] = {}
        for ids in batches:
            try:
                run = record_calls(self.stack, self.layers, ids)
                first = calls.setdefault(len(ids), run.calls)
                if not all(one.equals(other) for one, other in zip(run.calls, first, strict=True)):
                    raise UnsupportedModelError(
                        "passes inputs to its layers that depend on the text besides hidden states"
                    )
            except UnsupportedModelError as reason:
                raise self._refused(f"{type(self.model).__name__} {reason}") from None
            keep(run.hidden)
        for child in self.stack.children():
            if not set(self.layers) <= set(child.children()):
                child.to("meta")
        return calls

    def load_layer(self, index: int, read: ReadTensor) -> nn.Module:
        """Load a layer's weights in float32.

        Args:
            index: Index of the layer.
            read: Returns a tensor of the source by its name.

        Raises:
            SourceError: A tensor is missing, or transformers cannot load one.
        """
        self._load(self.layer_tensors[index], read)
        layer = self.layers[index]
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if tensor.is_meta:
                raise self._refused(f"layer {index}: the model needs {name}, which is missing from the source")
        return layer

    def drop_layer(self, index: int) -> None:
        """Release a layer's weights."""
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
    """Build the model described by a directory's config.json without weights, and find its decoder layers.

    Args:
        path: Directory of the source.
        names: Names of all tensors of the source.
        packed: Names of the weights to encode.

    Raises:
        SourceError: The architecture cannot be calibrated.
    """
    model = _build(path)
    renamed = _names_in_model(model, names)
    prefix = _find_layers(model, [renamed[name][0] for name in packed if not renamed[name][1]])
    if prefix is None:
        raise SourceError(
            Reason.CONFIG_FIELD,
            path / CONFIG_NAME,
            f"{type(model).__name__} has no list of layers that contains weights to encode",
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
                elsewhere[name] = "not a Linear in transformers' model"
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
                "is an encoder-decoder model, but only decoder layers can be calibrated",
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
    """Return each source tensor's name in the model, and whether it is merged with others there."""
    present = model.state_dict()
    rename = name_in_model(model, present)
    found = {}
    for name in names:
        renamed, merged = rename(name)
        found[name] = (name, False) if renamed not in present and name in present else (renamed, merged)
    return found


def _find_layers(model: nn.Module, wanted: Collection[str]) -> str | None:
    """Return the path of the module list with the most weights, or the outermost of several with equally many."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    counts = {name: sum(weight.startswith(f"{name}.") for weight in wanted) for name in lists}
    return max((name for name in lists if counts[name]), key=lambda name: (counts[name], -len(name)), default=None)


def _place_in_layers(target: str, prefix: str) -> tuple[int | None, str]:
    """Return a tensor's layer and its name within that layer."""
    if not target.startswith(f"{prefix}."):
        return None, target
    number, _, within = target.removeprefix(f"{prefix}.").partition(".")
    return (int(number), within) if number.isdecimal() else (None, target)


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
