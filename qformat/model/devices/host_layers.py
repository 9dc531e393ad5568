"""Loading within limits: layers that stay in host memory, and memory that must suffice before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from qformat.artifact.reading.reader import MappedShards
from qformat.artifact.reading.structure import ShardLayout
from qformat.errors import DeviceMemoryError
from qformat.kernels.cpu import SCRATCH_NBYTES
from qformat.model.build import attach, tensors_by_name
from qformat.model.devices.layer_stream import LayerDevice, LayerStream, layer_device
from qformat.model.devices.placement import (
    AUTO_SHARE,
    DeviceName,
    Placement,
    budget_of,
    model_sizes,
    place_automatically,
    place_by_map,
)
from qformat.model.memory import free_nbytes
from qformat.model.shard_tensors import TORCH_DTYPES, map_shards, tensors_of
from qformat.sizes import format_nbytes

_HOST = torch.device("cpu")

DeviceMap = Literal["auto"] | Mapping[str, DeviceName]


def decide(
    model: PreTrainedModel,
    layout: ShardLayout,
    names: Mapping[str, str],
    device: torch.device,
    device_map: DeviceMap,
    max_memory: Mapping[DeviceName, int | str] | None,
) -> Placement:
    """Return where the layers of a model on the meta device go.

    Raises: DeviceMemoryError with what is needed; UsageError for a map that does not fit the model.
    """
    sizes = model_sizes(model, layout, names)
    budget = budget_of(max_memory, device, free=free_nbytes, share=AUTO_SHARE)
    if device_map == "auto":
        placed = place_automatically(sizes, 2**63 if budget is None else budget)
    else:
        placed = place_by_map(sizes, device_map, device)
    _check_fits(layout.path, placed.device_nbytes, budget, device)
    host_budget = budget_of(max_memory, _HOST, free=free_nbytes, share=1.0)
    _check_fits(layout.path, placed.host_nbytes, host_budget, _HOST)
    return placed


def attach_placed(
    model: PreTrainedModel,
    shards: MappedShards,
    names: Mapping[str, str],
    device: torch.device,
    placed: Placement,
    *,
    streamed_by: LayerDevice | None = None,
) -> dict[str, str]:
    """Attach the tensors of an artifact, bring them to where they belong; return the names as `attach` does.

    The model gets a `layer_stream` where layers stay in host memory. streamed_by: what copies them, by default what
    fits the device. Raises: as `attach`.
    """
    taken = attach(model, tensors_of(shards, map_shards(shards)), names, shards.path)
    streamed = {name: model.get_submodule(name) for name in placed.streamed}
    kept_back = {id(module) for layer in streamed.values() for module in layer.modules()}
    for module in model.modules():
        if id(module) not in kept_back:
            module._apply(lambda tensor: tensor.to(device, copy=True), recurse=False)  # type: ignore[no-untyped-call]
    if streamed:
        model.layer_stream = LayerStream(streamed, streamed_by or layer_device(device))  # type: ignore[assignment]
    return taken


def check_fits_mapped(model: PreTrainedModel, layout: ShardLayout, names: Mapping[str, str]) -> None:
    """Refuse a model on the CPU that takes more memory than is free, beside what is mapped, which needs none.

    What is copied is what was kept in another dtype than the model has; decoding takes a buffer.
    Raises: DeviceMemoryError.
    """
    tensors = tensors_by_name(model)
    needed = largest = 0
    for name, renamed in names.items():
        if (tensor := tensors.get(renamed)) is None:
            continue
        nbytes = tensor.numel() * tensor.dtype.itemsize
        if name in layout.states:
            largest = max(largest, nbytes)
        elif TORCH_DTYPES[layout.located[name].entry.dtype] != tensor.dtype:
            needed += nbytes
    _check_fits(layout.path, needed + min(largest, SCRATCH_NBYTES), free_nbytes(_HOST), _HOST)


def _check_fits(path: Path, needed: int, allowed: int | None, device: torch.device) -> None:
    if allowed is not None and needed > allowed:
        raise DeviceMemoryError(
            f"{path}: needs {format_nbytes(needed, rounding='up')} on {device}, "
            f"and {format_nbytes(allowed, rounding='down')} may be used there. "
            "Free memory, or choose another dtype, device_map or max_memory"
        )
