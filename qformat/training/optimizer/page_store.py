"""Pages of optimizer states: at home in host memory, some resident on the device, the others streamed through a ring.

    home (host, pinned)     [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ][ 5 ][ 6 ] ...
    resident (device)       [ 0   1   2 ]                              the first pages, as many as the budget holds
    ring (device)                          3 leaves, 4 is updated, 5 arrives

A step is a cyclic sweep over all pages: a least-recently-used cache would evict each page just before its turn and
never hit, so the resident set is fixed. Only what does not stay resident has a home, until everything is paged out.

All memory that a step needs is allocated before its first update: an allocation that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qformat.training.optimizer.page_device import Copy, PageDevice

RING_PAGES = 3
"""One page arrives and one leaves while a third is updated."""

Budget = int | Literal["auto"]
"""Bytes of the device that pages may hold between steps; "auto": what the device has to spare."""


@dataclass(frozen=True, slots=True)
class PagingStatistics:
    """What paging did since the optimizer was made. Saving and loading states is not counted."""

    pages: int
    page_nbytes: int
    resident: int
    """Pages that are on the device now."""
    hits: int
    """Updates of a page that was resident."""
    misses: int
    """Updates of a page that was copied in and out for it."""
    nbytes_to_device: int
    nbytes_to_host: int
    stalls: int
    """Updates that were queued while the page they need was still arriving."""
    evictions: int
    """Pages that left the resident set, by `page_out` or because an allocation failed."""


@dataclass(eq=False)
class Window:
    """Bytes [start, stop) of the address space on the device: `memory` is uint8 [2, stop - start], one row a moment."""

    start: int
    stop: int
    memory: Tensor
    resident: bool


@dataclass(slots=True)
class Reservation:
    """The memory of one step besides the resident pages."""

    ring: list[Tensor] = field(default_factory=list)
    workspace: Tensor | None = None


class PageStore:
    """Memory of all pages, and their movements. A page is either resident or valid in its home."""

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
        """Add pages of zeros up to a number of pages; their memory comes with the next step."""
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
        """Allocate all that a sweep over some pages needs; fewer pages stay resident where memory is short.

        Raises torch.OutOfMemoryError if not even one page fits beside the workspace; no state is lost then.
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
                    break  # A shorter ring is slower, and correct.
            for page in range(self._n_resident, len(self._homes)):
                self._home(page)
        except BaseException:
            self.release(reservation)
            raise
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Give the memory of a step back."""
        for page in reservation.ring:
            self._device.release(page)
        reservation.ring.clear()
        if reservation.workspace is not None:
            self._device.release(reservation.workspace)
            reservation.workspace = None

    def sweep(self, pages: Sequence[int], reservation: Reservation) -> Iterator[Window]:
        """Yield windows that cover some pages, given in order. What is written to one is kept once the next is taken.

        While a page is updated, the next ones arrive in the ring and the one before leaves it.
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
            # The ring is given back after this, and the next sweep reads the homes.
            for copy in arriving + leaving:
                if copy is not None:
                    self._device.wait(copy)

    def page_out(self) -> None:
        """Move every resident page to its home; the next step brings them back, as many as fit by then."""
        while self._residents:
            self._evict_last()
        self._failed_pages = self._spare_pages = None
        if self._budget == "auto":
            self._device.forget_peak()

    def discard(self) -> None:
        """Give the resident pages back, and all states up."""
        self._device.drain()
        while self._residents:
            self._device.release(self._residents.pop().memory)
        self._homes.clear()
        self._n_resident = 0

    def read(self, row: int, start: int, out: Tensor) -> None:
        """Copy bytes from `start` of a moment's address space to uint8 `out` [n] in host memory."""
        self._device.drain()
        for memory, offset, nbytes in self._stretches(row, start, out.numel()):
            target = out[offset : offset + nbytes]
            if memory is None:
                target.zero_()
            else:
                target.copy_(memory)

    def write(self, row: int, start: int, data: Tensor) -> None:
        """Copy uint8 `data` [n] to bytes from `start` of a moment's address space. The pages must be at home."""
        self._device.drain()
        for page in range(start // self._row_nbytes, -(-(start + data.numel()) // self._row_nbytes)):
            assert page >= self._n_resident
            self._home(page)
        for memory, offset, nbytes in self._stretches(row, start, data.numel()):
            assert memory is not None
            memory.copy_(data[offset : offset + nbytes])

    def _stretches(self, row: int, start: int, nbytes: int) -> Iterator[tuple[Tensor | None, int, int]]:
        """Yield memory, one page or less at a time, with its offset from `start` and size; None: not yet allocated."""
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
        """Return the home of a page, uint8 [2, row], zeros if it had none."""
        home = self._homes[page]
        if home is None:
            home = self._homes[page] = self._device.host_page(self._page_nbytes)
        return home

    def _target_pages(self) -> int:
        """Return how many pages the budget, and what an earlier allocation ran into, let stay on the device."""
        allowed = len(self._homes)
        if self._budget != "auto":
            allowed = min(allowed, self._budget // self._page_nbytes)
        elif self._spare_pages is not None:
            allowed = min(allowed, self._spare_pages)
        elif (spare := self._device.spare_nbytes()) is not None:
            # Measured once, while no page is resident: later peaks would count the pages themselves.
            self._spare_pages = spare // self._page_nbytes
            allowed = min(allowed, self._spare_pages)
        return allowed if self._failed_pages is None else min(allowed, self._failed_pages)

    def _bring_in(self) -> None:
        """Extend the resident set to its target, in one piece of memory: a parameter within it is one view."""
        n_pages = missing = self._target_pages() - self._n_resident
        while n_pages > 0:
            try:
                memory = self._device.allocate(n_pages * self._page_nbytes).view(2, -1)
                break
            except torch.OutOfMemoryError:
                # Half, and no more after that: who took the memory will need some of the rest.
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
        """Move the youngest piece of the resident set to its homes."""
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
        """Return memory of the device, uint8 [nbytes], at the expense of resident pages if need be."""
        while True:
            try:
                return self._device.allocate(nbytes)
            except torch.OutOfMemoryError:
                if not self._residents:
                    raise
            self._evict_last()
            self._failed_pages = self._n_resident
