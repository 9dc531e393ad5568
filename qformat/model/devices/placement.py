"""Decide which layers of a model stay on a device and which in host memory, from headers alone.

A layer is a module that transformers does not split (`_no_split_modules`), such as a decoder layer. Everything else
(embeddings, norms and the head) is always on the device. Layers in host memory pass through two slots on the device.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qformat.artifact.components import Component
from qformat.artifact.reading.structure import ShardLayout
from qformat.errors import DeviceMemoryError, UsageError
from qformat.sizes import format_nbytes, parse_nbytes

N_SLOTS = 2
"""Slots on the device: one layer runs while the next is copied. More slots need memory and save no time."""

ALIGNMENT = 256
"""Alignment in bytes of each tensor in a slot: that of CUDA's own allocations, and enough for every kernel."""

ARENA_NBYTES = 2**30
"""Size in bytes of a piece of pinned host memory. torch rounds such allocations up to a power of two."""

AUTO_SHARE = 0.9
"""Share of the free memory that an automatic placement fills. The rest is for activations and the KV cache."""

DeviceName = str | int | torch.device
"""A device as in `torch.device`; an integer is the index of a GPU."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model's parts on a device.

    Attributes:
        layers: Bytes of each layer by name, in order.
        rest_nbytes: Bytes of everything outside the layers.
        scratch_nbytes: Bytes of the largest weight after decoding.
    """

    layers: Mapping[str, int]
    rest_nbytes: int
    scratch_nbytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Which layers are streamed from host memory, and how much memory the model needs.

    Attributes:
        streamed: Names of the streamed layers, in order.
        device_nbytes: Bytes on the device, slots included.
        slot_nbytes: Bytes of one slot.
        host_nbytes: Bytes of pinned host memory.
    """

    streamed: tuple[str, ...]
    device_nbytes: int
    slot_nbytes: int
    host_nbytes: int

    @property
    def n_slots(self) -> int:
        """Number of slots on the device."""
        return min(N_SLOTS, len(self.streamed))


def model_sizes(model: PreTrainedModel, layout: ShardLayout, names: Mapping[str, str]) -> ModelSizes:
    """Return the sizes that the parts of a model will have when its tensors are attached.

    Args:
        model: Model on the meta device.
        layout: Layout of the shards.
        names: The model's name of each tensor in the files.
    """
    layers = dict.fromkeys(layer_names(model), 0)
    rest = scratch = 0
    for name, nbytes, is_packed, decoded in _tensor_sizes(model, layout, names):
        if is_packed:
            scratch = max(scratch, decoded)
        owner = _owner(name, layers)
        if owner is None:
            rest += nbytes
        else:
            layers[owner] += nbytes
    return ModelSizes(layers, rest, scratch)


def layer_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the outermost layers of a model, in order.

    Raises:
        UsageError: transformers defines no layers for this model.
    """
    kinds = set(model._no_split_modules or [])
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    if not found:
        raise UsageError(
            f"device_map: transformers does not define the layers of {type(model).__name__}. Leave device_map out"
        )
    return found


def place_automatically(sizes: ModelSizes, budget_nbytes: int) -> Placement:
    """Stream as few layers as the memory budget allows, evenly spaced, so that other layers run during the copies.

    Args:
        sizes: Sizes of the model's parts.
        budget_nbytes: Bytes that the model may use on the device.

    Raises:
        DeviceMemoryError: The model does not fit even with all layers in host memory.
    """
    n_layers = len(sizes.layers)
    names = list(sizes.layers)
    for n_streamed in (0, *range(N_SLOTS + 1, n_layers + 1)):
        chosen = {int((number + 0.5) * n_layers / n_streamed) for number in range(n_streamed)}
        found = placement(sizes, [names[number] for number in sorted(chosen)])
        if found.device_nbytes <= budget_nbytes:
            return found
    least = placement(sizes, names if n_layers > N_SLOTS else [])
    raise DeviceMemoryError(
        "not enough memory on the device: the model needs at least "
        f"{format_nbytes(least.device_nbytes, rounding='up')} "
        f"(with {len(least.streamed)} of {n_layers} layers in host memory), "
        f"{format_nbytes(budget_nbytes, rounding='down')} is available"
    )


def place_by_map(sizes: ModelSizes, device_map: Mapping[str, DeviceName], device: torch.device) -> Placement:
    """Stream the layers that a map assigns to "cpu". The longest matching prefix of a layer's name decides.

    Args:
        sizes: Sizes of the model's parts.
        device_map: Device by prefix of a layer's name: "cpu" or `device`.
        device: Device that runs the model.

    Raises:
        UsageError: The map has an unknown name or device, splits a layer, or streams a part that is not a layer.
    """
    homes = {name: _is_host(name, home, device) for name, home in device_map.items()}
    for name, in_host in homes.items():
        outer = next((layer for layer in sizes.layers if _is_inside(name, layer)), None)
        if outer is not None and in_host != _home(outer, homes):
            raise UsageError(f"device_map {name!r}: a layer cannot be split. Map the layer {outer!r} instead")
        if in_host and outer is None and not any(layer == name or _is_inside(layer, name) for layer in sizes.layers):
            raise UsageError(
                f"device_map {name!r}: only layers can be in host memory, such as {next(iter(sizes.layers))!r}"
                + _nearest(name, sizes.layers)
            )
    return placement(sizes, [layer for layer in sizes.layers if _home(layer, homes)])


def placement(sizes: ModelSizes, streamed: Sequence[str]) -> Placement:
    """Return the placement that streams the given layers, with the memory that it needs.

    Args:
        sizes: Sizes of the model's parts.
        streamed: Names of the layers to stream, in order.
    """
    largest = max((sizes.layers[name] for name in streamed), default=0)
    resident = sum(nbytes for name, nbytes in sizes.layers.items() if name not in set(streamed))
    slots = largest * min(N_SLOTS, len(streamed))
    arenas = arena_sizes([sizes.layers[name] for name in streamed])
    return Placement(tuple(streamed), sizes.rest_nbytes + resident + slots + sizes.scratch_nbytes, largest, sum(arenas))


def arena_sizes(layer_nbytes: Sequence[int]) -> list[int]:
    """Return the sizes in bytes of the pieces of host memory that hold the layers.

    The layers fill the pieces in order. Sizes are powers of two, and no layer spans two pieces.
    """
    sizes: list[int] = []
    used = 0
    for nbytes in layer_nbytes:
        if not sizes or used + nbytes > ARENA_NBYTES:
            sizes.append(0)
            used = 0
        used += nbytes
        sizes[-1] = 1 << max(0, used - 1).bit_length()
    return sizes


def aligned(nbytes: int) -> int:
    """Return the number of bytes that a tensor of `nbytes` occupies in a slot."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def budget_of(
    max_memory: Mapping[DeviceName, int | str] | None,
    device: torch.device,
    *,
    free: Callable[[torch.device], int | None],
    share: float,
) -> int | None:
    """Return the memory budget of a device in bytes, or None if no limit is known.

    Args:
        max_memory: Memory limit by device, in bytes or as text such as "10GiB".
        device: Device to look up.
        free: Function that returns the free bytes of a device, or None if unknown.
        share: Share of the free memory to use if `max_memory` has no entry for the device.

    Raises:
        UsageError: A size in `max_memory` cannot be parsed.
    """
    for name, size in (max_memory or {}).items():
        if _same_device(name, device):
            return size if isinstance(size, int) else parse_nbytes(f"max_memory of {name!r}", size)
    found = free(device)
    return None if found is None else int(found * share)


def _tensor_sizes(
    model: PreTrainedModel, layout: ShardLayout, names: Mapping[str, str]
) -> Iterable[tuple[str, int, bool, int]]:
    """Yield name, bytes, whether it is packed, and bytes after decoding for every tensor; tied tensors once."""
    of_packed = {names[name]: name for name in layout.states}
    seen: set[int] = set()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        decoded = tensor.numel() * tensor.dtype.itemsize
        if name not in of_packed:
            yield name, aligned(decoded), False, decoded
            continue
        parts = (layout.located.get(of_packed[name] + part.value) for part in Component)
        yield name, sum(aligned(part.entry.nbytes) for part in parts if part is not None), True, decoded


def _owner(name: str, layers: Iterable[str]) -> str | None:
    parts = name.split(".")
    known = layers if isinstance(layers, dict) else set(layers)
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in known), None)


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _home(layer: str, homes: Mapping[str, bool]) -> bool:
    parts = layer.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    found = next((prefix for prefix in prefixes if prefix in homes), None)
    if found is None:
        raise UsageError(f"device_map: has no entry for {layer!r}. Add one, or add '' for everything not listed")
    return homes[found]


def _is_host(name: str, home: DeviceName, device: torch.device) -> bool:
    if home == "cpu" or home == torch.device("cpu"):
        return True
    if _same_device(home, device):
        return False
    raise UsageError(
        f"device_map {name!r}: found {home!r}, expected 'cpu' or {str(device)!r}, the device that runs the model. "
        "Several GPUs are not supported"
    )


def _same_device(name: DeviceName, device: torch.device) -> bool:
    if isinstance(name, int):
        return device.type == "cuda" and name == (device.index or 0)
    try:
        found = torch.device(name)
    except RuntimeError:
        return False
    return found.type == device.type and (found.index or 0) == (device.index or 0)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f". Did you mean {near[0]!r}?" if near else ""
