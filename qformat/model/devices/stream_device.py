"""Where shards are streamed to: a device's memory, the host memory that it copies from, and the copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qformat.artifact.header import DATA_ALIGNMENT


class Ticket(Protocol):
    """A copy that was started."""

    def wait(self) -> None:
        """Block until the copy is done, so that its host buffer may be reused. Raises what the copy failed with."""


class StreamDevice(Protocol):
    """Where shards go. `copy` is called by one thread, `Ticket.wait` by any, once for each copy."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory of the device, uint8 [nbytes], aligned to 16 bytes or, better, to a page."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """Return host memory that the device copies from, uint8 [nbytes], writable through `.numpy()`."""

    def copy(self, host: Tensor, target: Tensor) -> Ticket:
        """Start to copy uint8 [n] in a host buffer to uint8 [n] on the device."""


class TorchDevice:
    """A torch.device. CUDA: pinned buffers, copies on a stream of their own. Others: plain memory, immediate copies."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory, uint8 [nbytes], aligned to a page. Raises torch.OutOfMemoryError."""
        spare = torch.empty(nbytes + DATA_ALIGNMENT - 1, dtype=torch.uint8, device=self._device)
        if self._stream is not None:
            # The allocator may hand out memory that kernels on the current stream have yet to finish with.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        offset = -spare.data_ptr() % DATA_ALIGNMENT
        return spare[offset : offset + nbytes]

    def host_buffer(self, nbytes: int) -> Tensor:
        """Return host memory, uint8 [nbytes], pinned for CUDA."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def copy(self, host: Tensor, target: Tensor) -> Ticket:
        """Copy uint8 [n] to the device; for CUDA this only starts it."""
        if self._stream is None:
            target.copy_(host)
            return _Done()
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)
            # blocking: who waits for it sleeps, because the cores are needed for reading and hashing.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _EventTicket(event)


class _Done:
    def wait(self) -> None:
        """Nothing is pending."""


@dataclass(frozen=True, slots=True)
class _EventTicket:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()
