"""Stores pages of optimizer states in host memory, keeps some resident on the device and streams the others.

    device   ┌─ resident set ────┐   ┌─ ring of three buffers ─────────────────────────┐
             │ page 0   page 1   │   │   page 2          page 3           page 4       │
             │ page budget       │   │   leaving         being updated    arriving     │
             └───────────────────┘   └─────┼──────────────────────────────────▲────────┘
                                           │ copy out                 copy in │
    host                             ┌─────▼──────────────────────────────────┼────────┐
    (pinned)                         │   page 2          page 3           page 4   ... │
                                     └─────────────────────────────────────────────────┘

The resident set is the first pages, as many as the budget holds. It does not change between steps: every step sweeps
over all pages in the same order, so a least-recently-used cache would evict each page just before its use and never
hit. Resident pages need no host memory until they are paged out.

All memory of a step is allocated before its first update, so a failed allocation changes no state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qformat.training.optimizer.page_device import Copy, PageDevice

RING_PAGES = 3
"""Number of streaming buffers: one page arrives and one leaves while a third is updated."""

Budget = int | Literal["auto"]
"""Bytes of device memory for resident pages. "auto": as much as was free at the peak of memory use."""


@dataclass(frozen=True, slots=True)
class PagingStatistics:
    """Counts of paging since the optimizer was created. Saving and loading states does not count.

    Attributes:
        pages: Number of pages.
        page_nbytes: Size of a page in bytes.
        resident: Number of pages that are on the device now.
        hits: Number of updates of a resident page.
        misses: Number of updates of a streamed page, which was copied in and out.
        nbytes_to_device: Bytes copied to the device.
        nbytes_to_host: Bytes copied to host memory.
        stalls: Number of updates that were queued while their page was still arriving.
        evictions: Number of pages that left the resident set, by `page_out` or because an allocation failed.
    """

    pages: int
    page_nbytes: int
    resident: int
    hits: int
    misses: int
    nbytes_to_device: int
    nbytes_to_host: int
    stalls: int
    evictions: int


@dataclass(eq=False)
class Window:
    """A range of the address space that is on the device.

    Attributes:
        start: First byte of the range.
        stop: First byte after the range.
        memory: Device memory of the range, uint8 [2, stop - start], one row per moment.
        resident: Whether the window belongs to the resident set.
    """

    start: int
    stop: int
    memory: Tensor
    resident: bool


@dataclass(slots=True)
class Reservation:
    """Device memory of one step, apart from the resident pages.

    Attributes:
        ring: Buffers for streamed pages, uint8 [2, n] each.
        workspace: Temporary memory of the update, uint8 [n], or None.
    """

    ring: list[Tensor] = field(default_factory=list)
    workspace: Tensor | None = None


class PageStore:
    """Memory of all pages, and their movement. The valid copy of a page is either resident or in host memory.

    Args:
        device: Allocates and copies pages.
        page_nbytes: Size of a page in bytes.
        budget: Bytes of device memory for resident pages, or "auto".
    """

    def __init__(self, device: PageDevice, page_nbytes: int, budget: Budget) -> None:
        self._device = device
        self._page_nbytes = page_nbytes
        self._row_nbytes = page_nbytes // 2
        self._budget = budget
        self._spare_pages: int | None = None
        self._failed_pages: int | None = None
        self._homes: list[Tensor | None] = []
        self._residents: list[Window] = []
        self._n_resident = 0
        self._hits = self._misses = self._stalls = self._evictions = 0
        self._pages_in = self._pages_out = 0

    def grow(self, n_pages: int) -> None:
        """Add pages of zeros up to a total number of pages. The next step allocates their memory."""
        self._homes += [None] * (n_pages - len(self._homes))

    def statistics(self) -> PagingStatistics:
        """Return the counts so far."""
        return PagingStatistics(
            pages=len(self._homes),
            page_nbytes=self._page_nbytes,
            resident=self._n_resident,
            hits=self._hits,
            misses=self._misses,
            nbytes_to_device=self._pages_in * self._page_nbytes,
            nbytes_to_host=self._pages_out * self._page_nbytes,
            stalls=self._stalls,
            evictions=self._evictions,
        )

    def reserve(self, pages: Sequence[int], workspace_nbytes: int) -> Reservation:
        """Allocate the memory for a sweep. If device memory is short, fewer pages stay resident.

        Args:
            pages: Numbers of the pages to sweep over, ascending.
            workspace_nbytes: Size of the workspace in bytes.

        Returns:
            The memory, to be passed to `sweep` and `release`.

        Raises:
            torch.OutOfMemoryError: Not even one page fits beside the workspace. No state is lost.
        """
        self._bring_in()
        reservation = Reservation()
        try:
            if workspace_nbytes:
                reservation.workspace = self._allocate_or_evict(workspace_nbytes)
            while len(reservation.ring) < min(RING_PAGES, sum(page >= self._n_resident for page in pages)):
                if not reservation.ring:
                    reservation.ring.append(self._allocate_or_evict(self._page_nbytes).view(2, -1))
                    continue
                try:
                    reservation.ring.append(self._device.allocate(self._page_nbytes).view(2, -1))
                except torch.OutOfMemoryError:
                    break  # a shorter ring is slower but correct
            for page in range(self._n_resident, len(self._homes)):
                self._home(page)
        except BaseException:
            self.release(reservation)
            raise
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Release the memory of a step."""
        for page in reservation.ring:
            self._device.release(page)
        reservation.ring.clear()
        if reservation.workspace is not None:
            self._device.release(reservation.workspace)
            reservation.workspace = None

    def sweep(self, pages: Sequence[int], reservation: Reservation) -> Iterator[Window]:
        """Yield the pages on the device for an update, with resident pages first and streamed pages after.

        While one page is updated, the next ones arrive in the ring and the previous one leaves it. Changes to a window
        are saved when the caller takes the next window.

        Args:
            pages: Numbers of the pages to update, ascending.
            reservation: Memory from `reserve` for the same pages.

        Yields:
            Windows that cover all the pages. A resident window may cover more pages.
        """
        resident_pages = [page for page in pages if page < self._n_resident]
        ring, streamed = reservation.ring, pages[len(resident_pages) :]
        arriving: list[Copy | None] = [None] * len(ring)
        leaving: list[Copy | None] = [None] * len(ring)

        def fetch(turn: int) -> None:
            slot = turn % len(ring)
            arriving[slot] = self._device.copy_in(self._home(streamed[turn]), ring[slot], after=leaving[slot])
            leaving[slot] = None
            self._pages_in += 1

        try:
            for turn in range(min(len(ring) - 1, len(streamed))):
                fetch(turn)
            self._hits += len(resident_pages)
            for window in self._residents:
                if any(window.start <= page * self._row_nbytes < window.stop for page in resident_pages):
                    yield window
            for turn, page in enumerate(streamed):
                if turn + len(ring) - 1 < len(streamed):
                    fetch(turn + len(ring) - 1)
                slot = turn % len(ring)
                copy, arriving[slot] = arriving[slot], None
                assert copy is not None
                self._stalls += self._device.wait(copy)
                self._misses += 1
                start = page * self._row_nbytes
                yield Window(start, start + self._row_nbytes, ring[slot], resident=False)
                leaving[slot] = self._device.copy_out(ring[slot], self._home(page))
                self._pages_out += 1
        finally:
            # Afterwards the caller releases the ring, and the next sweep reads the host pages.
            for copy in arriving + leaving:
                if copy is not None:
                    self._device.wait(copy)

    def page_out(self) -> None:
        """Move all resident pages to host memory. The next step brings back as many as fit then."""
        while self._residents:
            self._evict_last()
        self._failed_pages = self._spare_pages = None
        if self._budget == "auto":
            self._device.forget_peak()

    def discard(self) -> None:
        """Discard all states and release the resident pages."""
        self._device.drain()
        while self._residents:
            self._device.release(self._residents.pop().memory)
        self._homes.clear()
        self._n_resident = 0

    def read(self, row: int, start: int, out: Tensor) -> None:
        """Copy bytes of a moment's address space to host memory.

        Args:
            row: Row of the moment, 0 or 1.
            start: First byte in the address space.
            out: Receives the bytes, uint8 [n] in host memory.
        """
        self._device.drain()
        for memory, offset, nbytes in self._stretches(row, start, out.numel()):
            target = out[offset : offset + nbytes]
            if memory is None:
                target.zero_()
            else:
                target.copy_(memory)

    def write(self, row: int, start: int, data: Tensor) -> None:
        """Copy bytes from host memory into a moment's address space. The pages must not be resident.

        Args:
            row: Row of the moment, 0 or 1.
            start: First byte in the address space.
            data: Bytes to write, uint8 [n] in host memory.
        """
        self._device.drain()
        for page in range(start // self._row_nbytes, -(-(start + data.numel()) // self._row_nbytes)):
            assert page >= self._n_resident
            self._home(page)
        for memory, offset, nbytes in self._stretches(row, start, data.numel()):
            assert memory is not None
            memory.copy_(data[offset : offset + nbytes])

    def _stretches(self, row: int, start: int, nbytes: int) -> Iterator[tuple[Tensor | None, int, int]]:
        """Yield memory of at most one page at a time (None if not allocated), its offset from `start`, and its size."""
        position = start
        while position < start + nbytes:
            page = position // self._row_nbytes
            stop = min((page + 1) * self._row_nbytes, start + nbytes)
            if page < self._n_resident:
                window = next(window for window in self._residents if window.start <= position < window.stop)
                memory, first = window.memory, window.start
            else:
                home, first = self._homes[page], page * self._row_nbytes
                if home is None:
                    yield None, position - start, stop - position
                    position = stop
                    continue
                memory = home
            yield memory[row, position - first : stop - first], position - start, stop - position
            position = stop

    def _home(self, page: int) -> Tensor:
        """Return the host memory of a page, uint8 [2, row]. Allocate zeros if it has none."""
        home = self._homes[page]
        if home is None:
            home = self._homes[page] = self._device.host_page(self._page_nbytes)
        return home

    def _target_pages(self) -> int:
        """Return how many pages may be resident, by the budget and by earlier failed allocations."""
        allowed = len(self._homes)
        if self._budget != "auto":
            allowed = min(allowed, self._budget // self._page_nbytes)
        elif self._spare_pages is not None:
            allowed = min(allowed, self._spare_pages)
        elif (spare := self._device.spare_nbytes()) is not None:
            # Measure once, while no page is resident. Later peaks would include the pages themselves.
            self._spare_pages = spare // self._page_nbytes
            allowed = min(allowed, self._spare_pages)
        return allowed if self._failed_pages is None else min(allowed, self._failed_pages)

    def _bring_in(self) -> None:
        """Extend the resident set to its target, in one piece of memory, so that one view covers a parameter."""
        n_pages = missing = self._target_pages() - self._n_resident
        while n_pages > 0:
            try:
                memory = self._device.allocate(n_pages * self._page_nbytes).view(2, -1)
                break
            except torch.OutOfMemoryError:
                # Try half, and do not extend further: other users of the memory need some of the rest.
                n_pages //= 2
        if n_pages < missing:
            self._failed_pages = self._n_resident + max(0, n_pages)
        if n_pages <= 0:
            return
        start = self._n_resident * self._row_nbytes
        window = Window(start, start + n_pages * self._row_nbytes, memory, resident=True)
        copies = []
        for page in range(self._n_resident, self._n_resident + n_pages):
            home, place = self._homes[page], self._place(window, page)
            if home is None:
                place.zero_()
            else:
                copies.append(self._device.copy_in(home, place))
        self._pages_in += len(copies)
        for copy in copies:
            self._device.wait(copy)
        self._residents.append(window)
        self._n_resident += n_pages

    def _evict_last(self) -> None:
        """Move the most recently added piece of the resident set to host memory."""
        window = self._residents[-1]
        first = window.start // self._row_nbytes
        homes = [self._home(page) for page in range(first, self._n_resident)]
        for page, home in enumerate(homes, first):
            self._device.copy_out(self._place(window, page), home)
        self._device.drain()
        self._pages_out += len(homes)
        self._evictions += len(homes)
        self._n_resident = first
        self._device.release(self._residents.pop().memory)

    def _place(self, window: Window, page: int) -> Tensor:
        """Return the memory of a page within a resident window, uint8 [2, row]."""
        offset = page * self._row_nbytes - window.start
        return window.memory[:, offset : offset + self._row_nbytes]

    def _allocate_or_evict(self, nbytes: int) -> Tensor:
        """Return device memory, uint8 [nbytes]. Evict resident pages if necessary."""
        while True:
            try:
                return self._device.allocate(nbytes)
            except torch.OutOfMemoryError:
                if not self._residents:
                    raise
            self._evict_last()
            self._failed_pages = self._n_resident
