"""The device that shards are streamed to: its memory, the host buffers that it copies from, and the copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qformat.artifact.header import DATA_ALIGNMENT


class Ticket(Protocol):
    """A copy that was started."""

    def wait(self) -> None:
        """Block until the copy is done, so that its host buffer may be reused. Raises the error of the copy, if any."""


class StreamDevice(Protocol):
    """Target of a stream. One thread calls `copy`; any thread may call `Ticket.wait`, once per copy."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory of the device, uint8 [nbytes], aligned to 16 bytes, preferably to a page."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """Return host memory to copy from, uint8 [nbytes], writable through `.numpy()`."""

    def copy(self, host: Tensor, target: Tensor) -> Ticket:
        """Start a copy from a host buffer to the device.

        Args:
            host: Source in a host buffer, uint8 [n].
            target: Target on the device, uint8 [n].
        """


class TorchDevice:
    """A torch device. CUDA uses pinned buffers and a separate stream for copies; other devices copy immediately."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory, uint8 [nbytes], aligned to a page. Raises torch.OutOfMemoryError."""
        spare = torch.empty(nbytes + DATA_ALIGNMENT - 1, dtype=torch.uint8, device=self._device)
        if self._stream is not None:
            # The allocator may return memory that kernels on the current stream still use.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        offset = -spare.data_ptr() % DATA_ALIGNMENT
        return spare[offset : offset + nbytes]

    def host_buffer(self, nbytes: int) -> Tensor:
        """Return host memory, uint8 [nbytes], pinned for CUDA."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def copy(self, host: Tensor, target: Tensor) -> Ticket:
        """Copy to the device. For CUDA, only start the copy.

        Args:
            host: Source in a host buffer, uint8 [n].
            target: Target on the device, uint8 [n].
        """
        if self._stream is None:
            target.copy_(host)
            return _Done()
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)
            # blocking=True: a waiting thread sleeps, because reading and hashing need the cores.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _EventTicket(event)


class _Done:
    def wait(self) -> None:
        """Return immediately: nothing is pending."""


@dataclass(frozen=True, slots=True)
class _EventTicket:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()
