"""The values that tuning trains: relative changes of the scales of packed weights, and norms. Codes never change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from qformat.artifact.components import Component
from qformat.artifact.manifest import KeptRecord
from qformat.artifact.packed_arrays import store_scales
from qformat.artifact.reading.reader import Artifact, PackedTensor
from qformat.errors import UsageError
from qformat.kernels.scaled_linear import linear_nf4_scaled
from qformat.model.build import names_in_model
from qformat.model.nf4_linear import NF4Linear
from qformat.model.shard_tensors import TORCH_DTYPES

LARGEST_CHANGE = 0.5
"""Largest relative change of a scale. `qformat verify --source` checks it."""

_PARTS_OF_SCALES = (Component.ABSMAX, Component.NESTED_ABSMAX, Component.NESTED_QUANT_MAP, Component.QUANT_STATE)
"""Components that change with the scales."""


class TunableLinear(nn.Module):
    """A linear layer with fixed codes and scales start * (1 + change), float32 [n_blocks], where `change` is trained.

    `start` has the artifact's scales. A scale of zero stays zero, and a negative one stays negative.

    Args:
        layer: The layer to replace.
        start: Scales of the artifact, float32 [n_blocks].
    """

    start: Tensor

    def __init__(self, layer: NF4Linear, start: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.block_size = layer.in_features, layer.out_features, layer.block_size
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("start", start, persistent=False)
        self.change = nn.Parameter(torch.zeros_like(start))

    def scales(self) -> Tensor:
        """Return the current scales, float32 [n_blocks]."""
        return torch.addcmul(self.start, self.start, self.change)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in_features] times the transposed weight, plus bias, in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = linear_nf4_scaled(
            x, self.weight, self.scales(), self.block_size, self.out_features, self.in_features, bias
        )
        return y


class _Rounded(nn.Module):
    """Rounds a value trained in float32 to the model's dtype, so that the forward pass uses what will be stored."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self._dtype)


@dataclass(frozen=True, slots=True)
class TunableModel:
    """A model with its trained values, keyed by the artifact's tensor names.

    Attributes:
        model: The model.
        linears: Its tunable layers.
        norms: Its norms, float32.
    """

    model: PreTrainedModel
    linears: Mapping[str, TunableLinear]
    norms: Mapping[str, nn.Parameter]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters in a fixed order."""
        return {**{name: layer.change for name, layer in self.linears.items()}, **self.norms}

    @torch.no_grad()
    def limit(self) -> None:
        """Clamp the changes of scales to the allowed range."""
        torch._foreach_clamp_min_([layer.change for layer in self.linears.values()], -LARGEST_CHANGE)
        torch._foreach_clamp_max_([layer.change for layer in self.linears.values()], LARGEST_CHANGE)

    @torch.no_grad()
    def rounded(self, artifact: Artifact) -> dict[str, dict[Component, NDArray[Any]]]:
        """Round scales and norms to what the artifact stores, also in the model, and return the changed components."""
        found: dict[str, dict[Component, NDArray[Any]]] = {}
        for name, layer in self.linears.items():
            tensor = artifact[name]
            assert isinstance(tensor, PackedTensor)
            scales = store_scales(layer.scales().cpu().numpy(), tensor.layout)
            parts = scales.with_codes(tensor.packed).components()
            found[name] = {part: parts[part] for part in _PARTS_OF_SCALES if part in parts}
            layer.start.copy_(torch.from_numpy(scales.scales()))
            layer.change.zero_()
        for name, norm in self.norms.items():
            record = artifact.manifest.tensors[name]
            assert isinstance(record, KeptRecord)
            stored = norm.to(TORCH_DTYPES[record.dtype])
            norm.copy_(stored)
            found[name] = {Component.PACKED: stored.cpu().contiguous().view(torch.uint8).numpy()}
        return found


def make_tunable(model: PreTrainedModel, artifact: Artifact) -> TunableModel:
    """Replace the packed layers of a model, make its norms trainable, and freeze everything else.

    Args:
        model: The model, loaded from the artifact.
        artifact: The open artifact.

    Raises:
        UsageError: The model has no packed layers.
    """
    model.requires_grad_(False)
    in_checkpoint = {
        inside: name for name, inside in names_in_model(model, artifact.manifest.tensors, artifact.path).items()
    }
    linears: dict[str, TunableLinear] = {}
    for module_name, layer in list(model.named_modules()):
        name = in_checkpoint.get(f"{module_name}.weight")
        if isinstance(layer, NF4Linear) and name is not None:
            tensor = artifact[name]
            assert isinstance(tensor, PackedTensor)
            start = torch.from_numpy(np.array(tensor.scales())).to(layer.weight.device)
            linears[name] = TunableLinear(layer, start)
            model.set_submodule(module_name, linears[name])
    if not linears:
        raise UsageError(f"{artifact.path}: contains no packed layers and therefore no scales to tune")
    norms = {
        in_checkpoint[name]: _train_norm(module, leaf)
        for name, module, leaf in list(_norm_parameters(model))
        if isinstance(artifact.manifest.tensors.get(in_checkpoint.get(name, "")), KeptRecord)
    }
    return TunableModel(model, linears, norms)


def share_kept_tensors(tunable: TunableModel, teacher: PreTrainedModel) -> None:
    """Make the model use the 16-bit model's tensors that are neither packed nor trained, if they are the same.

    Their digests were compared before. A second copy of a large embedding would only cost memory.

    Args:
        tunable: The model to tune.
        teacher: The 16-bit model.
    """
    shared = dict(teacher.named_parameters(remove_duplicate=False))
    for name, parameter in list(tunable.model.named_parameters(remove_duplicate=False)):
        other = shared.get(name)
        if other is None or parameter.requires_grad or other.dtype != parameter.dtype:
            continue
        if other.shape == parameter.shape:
            parent, _, leaf = name.rpartition(".")
            tunable.model.get_submodule(parent)._parameters[leaf] = other


def _norm_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield full name, module and parameter name of each one-dimensional parameter in modules of a norm class."""
    for module_name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1 and parameter.is_floating_point():
                    yield f"{module_name}.{leaf}", module, leaf


def _train_norm(module: nn.Module, leaf: str) -> nn.Parameter:
    value: Tensor = getattr(module, leaf)
    trained = nn.Parameter(value.detach().to(torch.float32, copy=True))
    module._parameters[leaf] = trained
    parametrize.register_parametrization(module, leaf, _Rounded(value.dtype), unsafe=True)
    return trained
