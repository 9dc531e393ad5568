"""Load within memory limits: check the needed memory before reading, and keep layers in host memory."""

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
"""Where layers go: "auto", or a device by prefix of a layer's name; "cpu" keeps the layer in host memory."""


def decide(
    model: PreTrainedModel,
    layout: ShardLayout,
    names: Mapping[str, str],
    device: torch.device,
    device_map: DeviceMap,
    max_memory: Mapping[DeviceName, int | str] | None,
) -> Placement:
    """Decide where the layers of a model go.

    Args:
        model: Model on the meta device.
        layout: Layout of the shards.
        names: The model's name of each tensor in the files.
        device: Device that runs the model.
        device_map: "auto", or a device by prefix of a layer's name.
        max_memory: Memory limit by device, in bytes or as text such as "10GiB", or None.

    Returns:
        The layers to stream and the memory that the model needs.

    Raises:
        DeviceMemoryError: The model does not fit. The message states how much memory is needed.
        UsageError: The map does not fit the model, or a size in `max_memory` cannot be parsed.
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
    """Attach the tensors of an artifact and move them to their devices.

    If layers stay in host memory, the model gets an attribute `layer_stream`.

    Args:
        model: Model on the meta device.
        shards: Open shards.
        names: The model's name of each tensor in the files.
        device: Device that runs the model.
        placed: Placement from `decide`.
        streamed_by: Implementation of the copies. Default: the one for `device`.

    Returns:
        The entries of `names` that were attached.

    Raises:
        ArtifactError: The tensors do not fit the model.
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
    """Check that a mapped model on the CPU fits into free memory.

    Mapped tensors need no memory of their own. Kept tensors are copied if their dtype differs from the model's, and
    decoding needs a buffer.

    Args:
        model: Model on the meta device.
        layout: Layout of the shards.
        names: The model's name of each tensor in the files.

    Raises:
        DeviceMemoryError: The copies and the buffer do not fit. The message states how much memory is needed.
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
            f"{path}: not enough memory on {device}: the model needs {format_nbytes(needed, rounding='up')}, "
            f"{format_nbytes(allowed, rounding='down')} is available. "
            "Free memory, or choose another dtype, device_map or max_memory"
        )
