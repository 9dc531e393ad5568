"""Where the pages of optimizer states are used: memory of a device, and copies between it and pages in host memory.

A page is uint8 [2, n]: one row for each of Adam's two moments. Copies are started and not waited for; the sweep
(`page_store`) says which copy must precede what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CUDA_RESERVE_NBYTES = 512 * 2**20
"""What an automatic budget leaves free: blocks that the allocator cannot use whole, and libraries' own memory."""


class Copy(Protocol):
    """A copy that was started. Only the device that started it knows what is inside."""


class PageDevice(Protocol):
    """Memory for pages, and ordered copies. Called by one thread; computation is queued on torch's current stream."""

    def host_page(self, nbytes: int) -> Tensor:
        """Return zeroed host memory that copies run from and to, uint8 [2, nbytes / 2]."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory of the device, uint8 [nbytes]. Raises torch.OutOfMemoryError."""

    def release(self, memory: Tensor) -> None:
        """Note that what `allocate` returned is no longer used: all its copies were waited for."""

    def copy_in(self, host: Tensor, page: Tensor, after: Copy | None = None) -> Copy:
        """Start to copy a host page, once what is queued so far and the copy `after` are done. Both uint8 [2, n]."""

    def copy_out(self, page: Tensor, host: Tensor) -> Copy:
        """Start to copy to a host page, once what is queued so far is done. Both uint8 [2, n]."""

    def wait(self, copy: Copy) -> bool:
        """Let what is queued from now on wait for a copy; return whether the copy was still under way."""

    def drain(self) -> None:
        """Block until every copy is done: host pages may be read, and memory of the device be given away."""

    def spare_nbytes(self) -> int | None:
        """Return what the busiest moment so far left free, less a reserve. None: the memory of the host itself."""

    def forget_peak(self) -> None:
        """Let `spare_nbytes` look at moments from now on only."""

    def empty_cache(self) -> None:
        """Give memory that an allocator keeps for later back to the device."""


def page_device(device: torch.device) -> PageDevice:
    """Return the implementation for a torch device."""
    return CudaPages(device) if device.type == "cuda" else PlainPages(device)


@dataclass(frozen=True, slots=True)
class _DoneCopy:
    """A copy that had ended when it was returned."""


class PlainPages:
    """Plain memory and immediate copies: the CPU, and devices without a way of their own to copy in the background."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host_page(self, nbytes: int) -> Tensor:
        """Return zeroed memory, uint8 [2, nbytes / 2]."""
        return torch.zeros(2, nbytes // 2, dtype=torch.uint8)

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory, uint8 [nbytes]."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def release(self, memory: Tensor) -> None:
        """Do nothing: memory goes with its last reference."""

    def copy_in(self, host: Tensor, page: Tensor, after: Copy | None = None) -> Copy:
        """Copy a host page now."""
        page.copy_(host)
        return _DoneCopy()

    def copy_out(self, page: Tensor, host: Tensor) -> Copy:
        """Copy to a host page now."""
        host.copy_(page)
        return _DoneCopy()

    def wait(self, copy: Copy) -> bool:
        """Return False: nothing is ever under way."""
        return False

    def drain(self) -> None:
        """Do nothing: nothing is ever under way."""

    def spare_nbytes(self) -> int | None:
        """Return None: states in the memory of the host are where they are used."""
        return None

    def forget_peak(self) -> None:
        """Do nothing: no peak is measured."""

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""


@dataclass(frozen=True, slots=True)
class _StreamCopy:
    done: torch.cuda.Event


class CudaPages:
    """CUDA memory and pinned host memory; one stream for each direction, since PCIe carries both at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_page(self, nbytes: int) -> Tensor:
        """Return zeroed pinned memory, uint8 [2, nbytes / 2]. torch rounds such memory up to a power of two bytes."""
        return torch.zeros(2, nbytes // 2, dtype=torch.uint8, pin_memory=True)

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory of the current stream, uint8 [nbytes]. Raises torch.OutOfMemoryError."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def release(self, memory: Tensor) -> None:
        """Do nothing: memory goes with its last reference, and the current stream has waited for its copies."""

    def copy_in(self, host: Tensor, page: Tensor, after: Copy | None = None) -> Copy:
        """Start to copy a host page, row by row: rows that lie apart, torch would copy through a buffer, and wait."""
        # The memory may have belonged to work of the current stream, and the host page to an earlier copy out,
        # which the current stream has waited for.
        self._inward.wait_stream(torch.cuda.current_stream(self._device))
        if after is not None:
            assert isinstance(after, _StreamCopy)
            self._inward.wait_event(after.done)
        return self._start(self._inward, host, page)

    def copy_out(self, page: Tensor, host: Tensor) -> Copy:
        """Start to copy to a host page, once the current stream has come as far as it is queued now."""
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        return self._start(self._outward, page, host)

    def wait(self, copy: Copy) -> bool:
        """Let the current stream wait. A copy counts as under way if it is so when the work is queued."""
        assert isinstance(copy, _StreamCopy)
        under_way = not copy.done.query()  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self._device).wait_event(copy.done)
        return under_way

    def drain(self) -> None:
        """Block until both streams are idle."""
        self._inward.synchronize()
        self._outward.synchronize()

    def spare_nbytes(self) -> int | None:
        """Return free and cached memory at torch's peak of allocated memory, less `CUDA_RESERVE_NBYTES`."""
        free, _ = torch.cuda.mem_get_info(self._device)
        usable = free + torch.cuda.memory_reserved(self._device)
        return max(0, usable - torch.cuda.max_memory_allocated(self._device) - CUDA_RESERVE_NBYTES)

    def forget_peak(self) -> None:
        """Reset torch's peak statistics of the device."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def empty_cache(self) -> None:
        """Empty torch's caching allocator."""
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def _start(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> Copy:
        with torch.cuda.stream(stream):
            for source_row, target_row in zip(source, target, strict=True):
                target_row.copy_(source_row, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return _StreamCopy(event)
