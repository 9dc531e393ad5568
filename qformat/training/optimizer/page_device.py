"""Allocates device memory for pages of optimizer states and copies pages between host and device.

A page is uint8 [2, n], with one row for each of Adam's two moments. Copies run asynchronously; the sweep (`page_store`)
defines their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CUDA_RESERVE_NBYTES = 512 * 2**20
"""Bytes of device memory that an automatic budget leaves free, for fragmentation and for the memory of libraries."""


class Copy(Protocol):
    """Handle of a copy that was started, meaningful only to the device that started it."""


class PageDevice(Protocol):
    """Memory for pages, and ordered copies. Used by one thread; computation is queued on torch's current stream."""

    def host_page(self, nbytes: int) -> Tensor:
        """Return zeroed host memory for a page, uint8 [2, nbytes / 2], suited for asynchronous copies."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised device memory, uint8 [nbytes].

        Raises:
            torch.OutOfMemoryError: The device has too little memory.
        """

    def release(self, memory: Tensor) -> None:
        """Release memory from `allocate`. The caller has waited for all its copies."""

    def copy_in(self, host: Tensor, page: Tensor, after: Copy | None = None) -> Copy:
        """Start to copy a page to the device, after all work queued so far.

        Args:
            host: Page in host memory, uint8 [2, n].
            page: Receives the page, device memory, uint8 [2, n].
            after: A copy that must end first, or None.

        Returns:
            The handle of the copy.
        """

    def copy_out(self, page: Tensor, host: Tensor) -> Copy:
        """Start to copy a page to host memory, after all work queued so far.

        Args:
            page: Page in device memory, uint8 [2, n].
            host: Receives the page, host memory, uint8 [2, n].

        Returns:
            The handle of the copy.
        """

    def wait(self, copy: Copy) -> bool:
        """Let all work queued from now on wait for a copy. Return whether the copy was still running."""

    def drain(self) -> None:
        """Block until all copies have ended, so that host pages can be read and device memory can be released."""

    def spare_nbytes(self) -> int | None:
        """Return the bytes that were free at the peak so far, minus a reserve. None if the device is the host."""

    def forget_peak(self) -> None:
        """Restart the peak measurement of `spare_nbytes`."""

    def empty_cache(self) -> None:
        """Return memory that the allocator caches to the device."""


def page_device(device: torch.device) -> PageDevice:
    """Return the implementation for a torch device."""
    return CudaPages(device) if device.type == "cuda" else PlainPages(device)


@dataclass(frozen=True, slots=True)
class _DoneCopy:
    """A copy that has already ended."""


class PlainPages:
    """Pages in plain memory with immediate copies, for the CPU and for devices without asynchronous copies.

    Args:
        device: Device of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host_page(self, nbytes: int) -> Tensor:
        """Return zeroed memory, uint8 [2, nbytes / 2]."""
        return torch.zeros(2, nbytes // 2, dtype=torch.uint8)

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory, uint8 [nbytes]."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def release(self, memory: Tensor) -> None:
        """Do nothing, because torch frees memory with its last reference."""

    def copy_in(self, host: Tensor, page: Tensor, after: Copy | None = None) -> Copy:
        """Copy a page to the device immediately.

        Args:
            host: Page in host memory, uint8 [2, n].
            page: Receives the page, uint8 [2, n].
            after: Ignored, because all earlier copies have ended.

        Returns:
            The handle of the copy, which has ended.
        """
        page.copy_(host)
        return _DoneCopy()

    def copy_out(self, page: Tensor, host: Tensor) -> Copy:
        """Copy a page to host memory immediately.

        Args:
            page: Page on the device, uint8 [2, n].
            host: Receives the page, uint8 [2, n].

        Returns:
            The handle of the copy, which has ended.
        """
        host.copy_(page)
        return _DoneCopy()

    def wait(self, copy: Copy) -> bool:
        """Return False, because all copies have ended."""
        return False

    def drain(self) -> None:
        """Do nothing, because all copies have ended."""

    def spare_nbytes(self) -> int | None:
        """Return None, because states in host memory need no copy to be used."""
        return None

    def forget_peak(self) -> None:
        """Do nothing, because no peak is measured."""

    def empty_cache(self) -> None:
        """Do nothing, because the memory has no cache."""


@dataclass(frozen=True, slots=True)
class _StreamCopy:
    done: torch.cuda.Event


class CudaPages:
    """Pages in CUDA memory and pinned host memory.

    Each direction has a stream of its own, because PCIe transfers in both directions at once.

    Args:
        device: CUDA device of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_page(self, nbytes: int) -> Tensor:
        """Return zeroed pinned memory, uint8 [2, nbytes / 2]. torch rounds its size up to a power of two."""
        return torch.zeros(2, nbytes // 2, dtype=torch.uint8, pin_memory=True)

    def allocate(self, nbytes: int) -> Tensor:
        """Return uninitialised memory of the current stream, uint8 [nbytes].

        Raises:
            torch.OutOfMemoryError: The device has too little memory.
        """
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def release(self, memory: Tensor) -> None:
        """Do nothing: torch frees memory with its last reference, and the current stream has waited for all copies."""

    def copy_in(self, host: Tensor, page: Tensor, after: Copy | None = None) -> Copy:
        """Start to copy a page to the device, row by row.

        torch would copy two rows that are not adjacent in memory through a buffer, and wait for it.

        Args:
            host: Page in pinned host memory, uint8 [2, n].
            page: Receives the page, CUDA memory, uint8 [2, n].
            after: A copy that must end first, or None.

        Returns:
            The handle of the copy.
        """
        # The current stream may still use the memory, and it has waited for an earlier copy to this host page.
        self._inward.wait_stream(torch.cuda.current_stream(self._device))
        if after is not None:
            assert isinstance(after, _StreamCopy)
            self._inward.wait_event(after.done)
        return self._start(self._inward, host, page)

    def copy_out(self, page: Tensor, host: Tensor) -> Copy:
        """Start to copy a page to host memory, after all work queued on the current stream.

        Args:
            page: Page in CUDA memory, uint8 [2, n].
            host: Receives the page, pinned host memory, uint8 [2, n].

        Returns:
            The handle of the copy.
        """
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        return self._start(self._outward, page, host)

    def wait(self, copy: Copy) -> bool:
        """Let the current stream wait for a copy. Return whether the copy was still running at the time of the call."""
        assert isinstance(copy, _StreamCopy)
        under_way = not copy.done.query()  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self._device).wait_event(copy.done)
        return under_way

    def drain(self) -> None:
        """Block until both streams are idle."""
        self._inward.synchronize()
        self._outward.synchronize()

    def spare_nbytes(self) -> int | None:
        """Return the bytes that were free or cached at the peak of allocated memory, minus `CUDA_RESERVE_NBYTES`."""
        free, _ = torch.cuda.mem_get_info(self._device)
        usable = free + torch.cuda.memory_reserved(self._device)
        return max(0, usable - torch.cuda.max_memory_allocated(self._device) - CUDA_RESERVE_NBYTES)

    def forget_peak(self) -> None:
        """Reset torch's peak memory statistics of the device."""
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
