"""Which layers of a model stay on a device, and which at home in host memory: decided from headers, nothing is read.

A layer is what transformers does not split (`_no_split_modules`: a decoder layer). Everything else, embeddings, norms
and the head, is always on the device. Layers in host memory pass through two slots of the device, in turn.
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
"""One layer runs while the next is copied. More would hold more memory, and the copies are in order all the same."""

ALIGNMENT = 256
"""Of each tensor in a slot: what CUDA's own allocations have, and more than any kernel asks for."""

ARENA_NBYTES = 2**30
"""Host memory is pinned in pieces of this size: torch rounds such allocations up to a power of two bytes."""

AUTO_SHARE = 0.9
"""Of the free memory that an automatic placement fills; the rest is for activations and the cache of attention."""

DeviceName = str | int | torch.device


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model's parts on a device. layers: by name, in their order; scratch: the largest weight, decoded."""

    layers: Mapping[str, int]
    rest_nbytes: int
    scratch_nbytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Which layers are streamed (home in host memory), in their order, and what all of it takes."""

    streamed: tuple[str, ...]
    device_nbytes: int
    slot_nbytes: int
    host_nbytes: int

    @property
    def n_slots(self) -> int:
        """Slots on the device."""
        return min(N_SLOTS, len(self.streamed))


def model_sizes(model: PreTrainedModel, layout: ShardLayout, names: Mapping[str, str]) -> ModelSizes:
    """Measure a model on the meta device, as it will be when the tensors of `layout` are attached under `names`."""
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
    """Return the layers of a model, outermost ones, in their order. Raises UsageError if transformers names none."""
    kinds = set(model._no_split_modules or [])
    found: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    if not found:
        raise UsageError(
            f"{type(model).__name__}: transformers does not say what its layers are: device_map needs that"
        )
    return found


def place_automatically(sizes: ModelSizes, budget_nbytes: int) -> Placement:
    """Stream as few layers as the budget of the device allows, spread evenly, so that copies hide behind the others.

    Raises: DeviceMemoryError with what is needed.
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
        f"needs at least {format_nbytes(least.device_nbytes, rounding='up')} on the device, "
        f"with {len(least.streamed)} of {n_layers} layers in host memory, "
        f"and {format_nbytes(budget_nbytes, rounding='down')} may be used there"
    )


def place_by_map(sizes: ModelSizes, device_map: Mapping[str, DeviceName], device: torch.device) -> Placement:
    """Stream the layers whose longest prefix in the map says "cpu"; all else is on `device`.

    Raises: UsageError for a name that the model does not have, another device, and parts that cannot be streamed.
    """
    homes = {name: _is_host(name, home, device) for name, home in device_map.items()}
    for name, in_host in homes.items():
        outer = next((layer for layer in sizes.layers if _is_inside(name, layer)), None)
        if outer is not None and in_host != _home(outer, homes):
            raise UsageError(f"device_map {name!r}: a layer is in one place as a whole: map {outer!r}")
        if in_host and outer is None and not any(layer == name or _is_inside(layer, name) for layer in sizes.layers):
            raise UsageError(
                f"device_map {name!r}: only layers can be in host memory, such as {next(iter(sizes.layers))!r}"
                + _nearest(name, sizes.layers)
            )
    return placement(sizes, [layer for layer in sizes.layers if _home(layer, homes)])


def placement(sizes: ModelSizes, streamed: Sequence[str]) -> Placement:
    """Return what it takes to stream these layers."""
    largest = max((sizes.layers[name] for name in streamed), default=0)
    resident = sum(nbytes for name, nbytes in sizes.layers.items() if name not in set(streamed))
    slots = largest * min(N_SLOTS, len(streamed))
    arenas = arena_sizes([sizes.layers[name] for name in streamed])
    return Placement(tuple(streamed), sizes.rest_nbytes + resident + slots + sizes.scratch_nbytes, largest, sum(arenas))


def arena_sizes(layer_nbytes: Sequence[int]) -> list[int]:
    """Return the pieces of host memory that layers fill in order: powers of two, a layer never in two of them."""
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
    """Return what a tensor takes in a slot."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def budget_of(
    max_memory: Mapping[DeviceName, int | str] | None,
    device: torch.device,
    *,
    free: Callable[[torch.device], int | None],
    share: float,
) -> int | None:
    """Return what may be used of a device: what `max_memory` says, or a share of what is free. None: no limit known.

    Raises: UsageError for a size that is none.
    """
    for name, size in (max_memory or {}).items():
        if _same_device(name, device):
            return size if isinstance(size, int) else parse_nbytes(f"max_memory of {name!r}", size)
    found = free(device)
    return None if found is None else int(found * share)


def _tensor_sizes(
    model: PreTrainedModel, layout: ShardLayout, names: Mapping[str, str]
) -> Iterable[tuple[str, int, bool, int]]:
    """Yield name, bytes, whether it is packed, and bytes when decoded, of every tensor; tied ones once."""
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
        raise UsageError(f"device_map: says nothing of {layer!r}. Add it, or '' for all that is not named")
    return homes[found]


def _is_host(name: str, home: DeviceName, device: torch.device) -> bool:
    if home == "cpu" or home == torch.device("cpu"):
        return True
    if _same_device(home, device):
        return False
    raise UsageError(
        f"device_map {name!r}: {home!r} is neither 'cpu' nor {str(device)!r}, where the model runs. "
        "Layers are computed on one device; several GPUs are not supported"
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
