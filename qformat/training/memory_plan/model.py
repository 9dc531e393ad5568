"""Builds the model of `train` on fake tensors, including PEFT's adapters, from headers and config.json.

Two parts behave differently on a GPU and have stand-ins: products that decode a weight, and masks that depend on the
values of tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from qformat.artifact.components import Component
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import BLOCK_SIZES, block_count, packed_nbytes
from qformat.codec.quant_state import QuantState
from qformat.errors import ArtifactError, Reason
from qformat.model.build import attach, build_on_meta, check_predicts_tokens, linear_at, names_in_model, read_config
from qformat.model.nf4_linear import NF4Linear
from qformat.model.rules.loading_rules import ignored_extras
from qformat.model.shard_tensors import TORCH_DTYPES, PackedComponents
from qformat.names import CONFIG_NAME
from qformat.training.adapter.attach import add_adapter
from qformat.training.adapter.lora_linear import NF4LoraLinear, lora_linear
from qformat.training.adapter.output_layer import decode_output_layer
from qformat.training.memory_plan.tensors import ModelTensors
from qformat.training.settings import TrainingSettings

_OF_ITS_PLACE = re.compile(r"idx|index|number|_id$|^_|^training$|^gradient_checkpointing$")
"""Attributes in which identical layers may differ."""


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A model with adapters on fake tensors.

    Attributes:
        mode: Mode in which the model runs.
        model: Model with adapters.
        decodes_output: Whether the output layer was packed, so that training decodes it.
        layers: Decoder layers. Empty if they cannot be found; then the whole model runs.
        kinds: Kind of each layer. Layers of the same kind need the same memory.
    """

    mode: FakeTensorMode
    model: PeftModel
    decodes_output: bool
    layers: list[nn.Module]
    kinds: list[object]

    @classmethod
    def build(cls, tensors: ModelTensors, settings: TrainingSettings, *, trust_remote_code: bool) -> FakeModel:
        """Build the model.

        Args:
            tensors: Tensors of the model.
            settings: Settings of the training.
            trust_remote_code: Whether to run model code that comes with the model.

        Returns:
            The model with adapters.

        Raises:
            ArtifactError: The tensors and config.json do not fit together.
            UsageError: The settings do not fit the model.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # some models create constants
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            base, decodes_output = _base(tensors, mode, trust_remote_code)
            with mode:
                with torch.device("meta"):  # PEFT does not try to move tensors on this device
                    model = add_adapter(base, settings, base_name=str(tensors.folder))
                _leave_meta(model)
        for module in model.modules():
            if isinstance(module, NF4LoraLinear):
                module.__class__ = _DecodingLoraLinear
        layers = _decoder_layers(base)
        return cls(mode, model, decodes_output, layers, [_kind(base, layer, n) for n, layer in enumerate(layers)])


def _base(tensors: ModelTensors, mode: FakeTensorMode, trust_remote_code: bool) -> tuple[PreTrainedModel, bool]:
    """Return the model without adapters, and whether its output layer was packed."""
    check_predicts_tokens(tensors.folder, trust_remote_code=trust_remote_code)
    config = read_config(tensors.folder, trust_remote_code=trust_remote_code)
    with mode:
        model = build_on_meta(
            tensors.folder, config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code, attention=None
        )
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(_attention())
        places = names_in_model(model, tensors.packed, tensors.folder)
        found: dict[str, PackedComponents | Tensor] = {name: _empty(new) for name, new in tensors.kept.items()}
        ignored = ignored_extras(model, places.values() - model.state_dict().keys())
        for name, parts in tensors.packed.items():
            if places[name] in ignored:
                continue
            shape = tuple(linear_at(model, places[name], tensors.folder).weight.shape)
            found[name] = _packed(name, parts, shape, tensors)
        attach(model, found, names_in_model(model, found, tensors.folder), tensors.folder)
        return model, decode_output_layer(model)


class _DecodingLoraLinear(NF4LoraLinear):
    """The same autograd node, with a product whose decoded weight is also a fake tensor."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else self._plain_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[adapter]
        dropped = None if isinstance(dropout, nn.Identity) else dropout(x)
        lora_a = cast(nn.Linear, self.lora_A[adapter]).weight
        lora_b = cast(nn.Linear, self.lora_B[adapter]).weight
        base = _DecodedProduct(cast(NF4Linear, self.base_layer))
        return lora_linear(x, dropped, lora_a, lora_b, self.scaling[adapter], base)


@dataclass(frozen=True, slots=True)
class _DecodedProduct:
    layer: NF4Linear

    def linear(self, x: Tensor) -> Tensor:
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        return functional.linear(x, self._decoded(x), bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return torch.mm(grad, self._decoded(grad))

    def _decoded(self, x: Tensor) -> Tensor:
        return x.new_empty(self.layer.out_features, self.layer.in_features)


def _attention() -> str:
    """Register transformers' sdpa attention with masks that do not depend on the values of tensors. Return its name.

    The masks are those of unpadded rows. For padded or packed rows, `_inputs` gives the mask.
    """

    def mask(*_: Any, batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **__: Any) -> Any:
        if local_size is None or kv_length < local_size:
            return None  # is_causal is enough
        return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)

    AttentionInterface.register("qformat_plan", sdpa_attention_forward)
    AttentionMaskInterface.register("qformat_plan", mask)
    return "qformat_plan"


def _leave_meta(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                new = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    lists = [
        list(module)
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return max(lists, key=len, default=[])


def _kind(model: PreTrainedModel, layer: nn.Module, number: int) -> object:
    """Return a key that is equal for layers that need the same memory: shapes, settings, kind of attention."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    shapes = tuple(
        (name, tuple(t.shape), t.dtype, t.requires_grad)
        for name, t in [*layer.named_parameters(), *layer.named_buffers()]
    )
    attributes = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, int | float | str | None) and not _OF_ITS_PLACE.search(key)
    )
    return type(layer), types[number] if types else None, shapes, attributes


def _empty(new: TensorSpec) -> Tensor:
    return torch.empty(new.shape, dtype=TORCH_DTYPES[new.dtype])


def _packed(
    name: str, parts: Mapping[Component, TensorSpec], shape: tuple[int, ...], tensors: ModelTensors
) -> PackedComponents:
    n_elements, n_blocks = shape[0] * shape[1], parts[Component.ABSMAX].shape[0]
    codes = parts[Component.PACKED]
    block_size = next((size for size in BLOCK_SIZES if block_count(n_elements, size) == n_blocks), None)
    if block_size is None or not 0 <= codes.nbytes - packed_nbytes(n_elements) < 4:
        raise ArtifactError(
            Reason.COMPONENT_SHAPE,
            tensors.folder / CONFIG_NAME,
            f"{codes.nbytes} bytes of packed codes and {n_blocks} blocks do not fit the model's shape {list(shape)}",
            tensor=name,
        )
    components = {part: _empty(new) for part, new in parts.items()}
    components[Component.PACKED] = torch.empty(packed_nbytes(n_elements), 1, dtype=torch.uint8)
    double = Component.NESTED_ABSMAX in parts
    return PackedComponents(components, QuantState(block_size, FloatFormat.BF16, shape, 0.0 if double else None))
