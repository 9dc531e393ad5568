"""Decode the packed layers of a loaded model in memory: each `NF4Linear` becomes an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from qformat.errors import DeviceMemoryError, UsageError
from qformat.model.memory import free_nbytes
from qformat.model.nf4_linear import NF4Linear
from qformat.sizes import format_nbytes

_DECODED = (torch.bfloat16, torch.float16, torch.float32)


def decode_linears(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every packed layer by a plain one with the decoded weight.

    Args:
        model: Model to change in place.
        dtype: Dtype of the decoded weights.

    Raises:
        UsageError: The model has adapters or layers in host memory, or the dtype is not floating-point.
        DeviceMemoryError: The decoded weights do not fit into free memory. The message states how much is needed.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise UsageError(f"dtype={dtype}, expected a floating-point dtype of 16 bits or more")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    if any(name.endswith(".base_layer") for name in packed):
        raise UsageError("a model with adapters cannot be decoded. Call dequantize() first, then attach the adapters")
    if hasattr(model, "layer_stream") or any(layer.weight.is_meta for layer in packed.values()):
        raise UsageError(
            "a model with layers in host memory or on disk cannot be decoded. Export the artifact (qformat export) and "
            "load that model"
        )
    _check_memory(packed.values(), dtype)
    for name, layer in packed.items():
        weight = layer.dequantize(dtype if dtype in _DECODED else torch.float32).to(dtype)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight)
        plain.bias = layer.bias
        plain.train(layer.training)
        model.set_submodule(name, plain)


def _check_memory(layers: Iterable[NF4Linear], dtype: torch.dtype) -> None:
    needed: dict[torch.device, int] = {}
    for layer in layers:
        nbytes = layer.out_features * layer.in_features * dtype.itemsize
        needed[layer.weight.device] = needed.get(layer.weight.device, 0) + nbytes
    for device, nbytes in needed.items():
        free = free_nbytes(device)
        if free is not None and nbytes > free:
            raise DeviceMemoryError(
                f"not enough memory on {device}: the decoded weights need {format_nbytes(nbytes, rounding='up')}, "
                f"{format_nbytes(free, rounding='down')} is free. Export the artifact instead (qformat export)"
            )
