"""What tuning trains: the scales of packed weights, relative to what they were, and the norms. Codes never change."""

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
"""A scale stays within 1 - this and 1 + this of what it was: `qformat verify --source` checks it."""

_PARTS_OF_SCALES = (Component.ABSMAX, Component.NESTED_ABSMAX, Component.NESTED_QUANT_MAP, Component.QUANT_STATE)


class TunableLinear(nn.Module):
    """A linear layer of fixed codes whose scales are start * (1 + change): float32 [n_blocks]; change is trained.

    start is what the artifact has; a scale that is zero stays zero, and one that is negative stays negative.
    """

    start: Tensor

    def __init__(self, layer: NF4Linear, start: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.block_size = layer.in_features, layer.out_features, layer.block_size
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("start", start, persistent=False)
        self.change = nn.Parameter(torch.zeros_like(start))

    def scales(self) -> Tensor:
        """Return the scales of now, float32 [n_blocks]."""
        return torch.addcmul(self.start, self.start, self.change)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in_features] times the weight's transpose, plus bias, in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = linear_nf4_scaled(
            x, self.weight, self.scales(), self.block_size, self.out_features, self.in_features, bias
        )
        return y


class _Rounded(nn.Module):
    """Trained in float32, used in the model's dtype: the forward pass sees what will be stored."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self._dtype)


@dataclass(frozen=True, slots=True)
class TunableModel:
    """A model and what is trained of it, by the artifact's names of tensors. norms: float32 parameters."""

    model: PreTrainedModel
    linears: Mapping[str, TunableLinear]
    norms: Mapping[str, nn.Parameter]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, in a fixed order."""
        return {**{name: layer.change for name, layer in self.linears.items()}, **self.norms}

    @torch.no_grad()
    def limit(self) -> None:
        """Bring changes of scales back to the allowed range."""
        torch._foreach_clamp_min_([layer.change for layer in self.linears.values()], -LARGEST_CHANGE)
        torch._foreach_clamp_max_([layer.change for layer in self.linears.values()], LARGEST_CHANGE)

    @torch.no_grad()
    def rounded(self, artifact: Artifact) -> dict[str, dict[Component, NDArray[Any]]]:
        """Round scales and norms to what the artifact stores, also in the model; return the components that changed."""
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
    """Replace the packed layers of a model of the artifact, and make its norms trainable; all else is frozen.

    Raises UsageError where nothing is packed.
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
        raise UsageError(f"{artifact.path}: holds no packed layer, so there are no scales to tune")
    norms = {
        in_checkpoint[name]: _train_norm(module, leaf)
        for name, module, leaf in list(_norm_parameters(model))
        if isinstance(artifact.manifest.tensors.get(in_checkpoint.get(name, "")), KeptRecord)
    }
    return TunableModel(model, linears, norms)


def share_kept_tensors(tunable: TunableModel, teacher: PreTrainedModel) -> None:
    """Let the model use the 16-bit model's own tensors where they are the same: neither packed nor trained.

    They were compared by their digests; a second copy of a large embedding would only cost memory.
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
    """Yield name, module and the name in it of each one-dimensional parameter of a module that is called a norm."""
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
