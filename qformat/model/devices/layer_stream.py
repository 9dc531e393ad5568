"""Stream layers from host memory through a device: the next layer is copied while the current one runs.

    host memory (pinned)  [ layer 0 | layer 1 | layer 2 | layer 3 ]

    computation           run 0 in slot 0 │ run 1 in slot 1 │ run 2 in slot 0 │ ...      time ──►
    copies                  1 ──► slot 1  │   2 ──► slot 0  │   3 ──► slot 1  │ ...

`LayerStream` packs the tensors of each layer into host memory (pinned for CUDA) and owns two slots on the device. Hooks
bring a layer in before its forward pass and before its backward pass, in which gradient checkpointing runs the forward
pass again. While a layer is current, its tensors are views of its slot. When another streamed layer is entered, or when
`state_dict` is called, they lie in host memory again. `state_dict` and `save_pretrained` therefore return and write the
complete model.

A copy into a slot waits for all work that was queued before. That includes the layer that last used the slot, because
the layer after it is being entered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from qformat.errors import UsageError
from qformat.model.devices.placement import N_SLOTS, aligned, arena_sizes
from qformat.model.shard_tensors import tensor_over


class Copy(Protocol):
    """A copy that was started. Its contents are private to the device that started it."""


class LayerDevice(Protocol):
    """Memory of a device and ordered copies to it. Computation is queued on torch's current stream."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory of the device, uint8 [nbytes]. Raises torch.OutOfMemoryError."""

    def host_memory(self, nbytes: int) -> Tensor:
        """Return host memory to copy from, uint8 [nbytes]."""

    def copy(self, host: Tensor, slot: Tensor) -> Copy:
        """Start a copy to the device that runs after all work that is queued so far.

        Args:
            host: Source in host memory, uint8 [n].
            slot: Target on the device, uint8 [n].
        """

    def wait(self, copy: Copy) -> None:
        """Make all work that is queued from now on wait for a copy."""


class PlainLayers:
    """Plain memory and immediate copies, for devices that cannot copy in the background."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory, uint8 [nbytes]."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def host_memory(self, nbytes: int) -> Tensor:
        """Return memory, uint8 [nbytes]."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, host: Tensor, slot: Tensor) -> Copy:
        """Copy immediately.

        Args:
            host: Source in host memory, uint8 [n].
            slot: Target on the device, uint8 [n].
        """
        slot.copy_(host)
        return object()

    def wait(self, copy: Copy) -> None:
        """Do nothing: every copy is already done."""


class CudaLayers:
    """CUDA memory, pinned host memory and a CUDA stream for the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory of the current stream, uint8 [nbytes]. Raises torch.OutOfMemoryError."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def host_memory(self, nbytes: int) -> Tensor:
        """Return pinned memory, uint8 [nbytes]."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, host: Tensor, slot: Tensor) -> Copy:
        """Start a copy that runs after all work queued on the current stream.

        Args:
            host: Source in pinned host memory, uint8 [n].
            slot: Target on the device, uint8 [n].
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            slot.copy_(host, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event

    def wait(self, copy: Copy) -> None:
        """Make the current stream wait for the copy. This thread does not wait."""
        assert isinstance(copy, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(copy)


def layer_device(device: torch.device) -> LayerDevice:
    """Return the implementation for a torch device."""
    return CudaLayers(device) if device.type == "cuda" else PlainLayers(device)


@dataclass(frozen=True, slots=True)
class _Place:
    """Place where a module keeps a tensor. `others` are further places of the same tensor."""

    tensors: dict[str, Any]
    name: str
    others: tuple[tuple[dict[str, Any], str], ...]
    is_parameter: bool
    dtype: torch.dtype
    shape: torch.Size
    start: int

    def at_home(self, memory: Tensor) -> Tensor:
        """Return the tensor over host memory, uint8. Like every loaded tensor, it has a storage of its own."""
        return self._wrapped(tensor_over(memory, self.start, self.dtype, self.shape))

    def in_slot(self, slot: Tensor) -> Tensor:
        """Return the tensor as a view of a slot, uint8: autograd notices when another layer overwrites it."""
        nbytes = self.shape.numel() * self.dtype.itemsize
        return self._wrapped(slot[self.start : self.start + nbytes].view(self.dtype).view(self.shape))

    def _wrapped(self, tensor: Tensor) -> Tensor:
        return nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor

    def put(self, tensor: Tensor) -> None:
        """Attach a tensor to the module."""
        self.tensors[self.name] = tensor
        for tensors, name in self.others:
            tensors[name] = tensor


@dataclass(slots=True)
class _Layer:
    name: str
    module: nn.Module
    places: tuple[_Place, ...]
    host: Tensor
    at_home: tuple[Tensor, ...]
    in_slots: dict[int, tuple[Tensor, ...]]

    def bind(self, tensors: Sequence[Tensor]) -> None:
        for place, tensor in zip(self.places, tensors, strict=True):
            place.put(tensor)


class LayerStream:
    """Streams some layers of a model through a device. Creating it registers the hooks that do all the work."""

    def __init__(self, layers: Mapping[str, nn.Module], device: LayerDevice) -> None:
        """Copy the tensors of the layers into host memory of the device and register the hooks.

        The tensors get no gradients. Tensors that are added to a layer later, such as adapters, are moved to the device
        and may have gradients.

        Args:
            layers: Layers by name, in the order in which they run, with tensors in host memory, mapped or not.
            device: Implementation of memory and copies.
        """
        self._device = device
        places = {name: _places_of(module) for name, module in layers.items()}
        sizes = [_nbytes_of(found) for found in places.values()]
        self._layers = self._taken_home(layers, places, sizes)
        self._slots = [device.allocate(max(sizes)) for _ in range(min(N_SLOTS, len(sizes)))]
        self._holds: list[int | None] = [None] * len(self._slots)
        self._pending: list[Copy | None] = [None] * len(self._slots)
        self._current: int | None = None
        self._direction = 1
        for number, layer in enumerate(self._layers):
            layer.module.register_forward_pre_hook(partial(self._before_forward, number))
            layer.module.register_full_backward_pre_hook(partial(self._before_backward, number))
            layer.module.register_state_dict_pre_hook(partial(self._before_state_dict, number))  # type: ignore[no-untyped-call]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers that stay in host memory."""
        return tuple(layer.name for layer in self._layers)

    @property
    def pass_nbytes(self) -> int:
        """Number of bytes that one pass through the model copies to the device."""
        return sum(layer.host.nbytes for layer in self._layers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, number: int) -> None:
        """Bring a layer to the device and start to copy the layer that will probably be next."""
        if self._current is not None and self._current != number:
            self._layers[self._current].bind(self._layers[self._current].at_home)
        self._turn_to(number)
        slot = self._slot_of(number)
        pending = self._pending[slot]
        if pending is not None:
            self._device.wait(pending)
            self._pending[slot] = None
        layer = self._layers[number]
        if slot not in layer.in_slots:
            layer.in_slots[slot] = tuple(place.in_slot(self._slots[slot]) for place in layer.places)
        layer.bind(layer.in_slots[slot])
        self._current = number
        _bring_along(layer.module, self._slots[slot].device)
        following = self._following()
        if following is not None:
            self._slot_of(following)

    def _taken_home(
        self, layers: Mapping[str, nn.Module], places: Mapping[str, tuple[_Place, ...]], sizes: Sequence[int]
    ) -> list[_Layer]:
        arenas = [self._device.host_memory(nbytes) for nbytes in arena_sizes(sizes)]
        found: list[_Layer] = []
        used = arena = 0
        for (name, module), nbytes in zip(layers.items(), sizes, strict=True):
            if used + nbytes > len(arenas[arena]):
                arena, used = arena + 1, 0
            host = arenas[arena][used : used + nbytes]
            used += nbytes
            at_home = tuple(place.at_home(host) for place in places[name])
            for place, tensor in zip(places[name], at_home, strict=True):
                tensor.copy_(place.tensors[place.name].detach())
            found.append(_Layer(name, module, places[name], host, at_home, {}))
            found[-1].bind(at_home)
        return found

    def _slot_of(self, number: int) -> int:
        """Return the slot that holds a layer. If there is none, start to copy the layer into one."""
        if number in self._holds:
            return self._holds.index(number)
        slot = next(index for index, held in enumerate(self._holds) if held is None or held != self._current)
        layer = self._layers[number]
        self._holds[slot] = number
        self._pending[slot] = self._device.copy(layer.host, self._slots[slot][: len(layer.host)])
        return slot

    def _turn_to(self, number: int) -> None:
        """Record the direction in which layers are entered; a backward pass goes downwards."""
        n_layers, last = len(self._layers), self._current
        if last is None or number == (last + 1) % n_layers:
            self._direction = 1
        elif number in {last, last - 1}:
            self._direction = -1

    def _following(self) -> int | None:
        """Return the layer that will probably be entered next, or None if the pass turns around here."""
        assert self._current is not None
        following = self._current + self._direction
        if 0 <= following < len(self._layers):
            return following
        # In training, the backward pass begins with the layers at which the forward pass ends, and vice versa.
        return None if self._layers[self._current].module.training else following % len(self._layers)

    def _before_forward(self, number: int, module: nn.Module, arguments: Any) -> None:
        checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
        trained = module.training or any(parameter.requires_grad for parameter in module.parameters())
        if torch.is_grad_enabled() and trained and not checkpointed:
            raise UsageError(
                f"layer {self._layers[number].name!r} is streamed from host memory: its weights are no longer on the "
                "device during the backward pass. To train, call model.gradient_checkpointing_enable(). "
                "To evaluate, use torch.no_grad()"
            )
        self.enter(number)

    def _before_backward(self, number: int, module: nn.Module, gradients: Any) -> None:
        self.enter(number)

    def _before_state_dict(self, number: int, *_: object) -> None:
        """Bring a layer home: tensors in a slot share its storage, and the next layer overwrites them."""
        self._layers[number].bind(self._layers[number].at_home)

    def __reduce__(self) -> NoReturn:
        raise UsageError("a model with layers in host memory cannot be copied or pickled. Load it again instead")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce__()


def _places_of(module: nn.Module) -> tuple[_Place, ...]:
    """Return the places of all tensors of a layer, with the offset of each in the layer's memory."""
    found: dict[int, tuple[Tensor, list[tuple[dict[str, Any], str]]]] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (tensor, []))[1].append((tensors, name))
    places: list[_Place] = []
    start = 0
    for tensor, ((tensors, name), *others) in found.values():
        is_parameter = isinstance(tensor, nn.Parameter)
        places.append(_Place(tensors, name, tuple(others), is_parameter, tensor.dtype, tensor.shape, start))
        start += aligned(tensor.nbytes)
    return tuple(places)


def _nbytes_of(places: Sequence[_Place]) -> int:
    return max((place.start + aligned(place.shape.numel() * place.dtype.itemsize) for place in places), default=0)


def _bring_along(module: nn.Module, device: torch.device) -> None:
    """Move parameters that were added after loading, such as adapters, to the device; they stay there."""
    for parameter in module.parameters():
        if parameter.device != device:
            parameter.data = parameter.data.to(device)
