"""Where each parameter's states lie in the pages: integers only, no memory.

Adam has two moments, laid out alike: a page has two rows, and row 0 of all pages, one after the other, is the address
space of the first moment, row 1 that of the second. A parameter takes one span of it, so that it is contiguous in each
moment wherever pages lie side by side; small parameters share a page, large ones run over several.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

FLOAT_UNIT_NBYTES = 64
"""Cutting a tensor at multiples of 64 bytes from its start keeps the bits of vector kernels: no supported instruction
set has longer vectors, so the scalar tail of a cut tensor is that of the whole one. It also aligns every span."""

BLOCK_SIZE = 256
"""Elements that share a scale in 8-bit states, as in bitsandbytes."""

BLOCK_NBYTES = BLOCK_SIZE + 4
"""A block of 8-bit states: its codes, then its absmax as float32."""

PAGE_GRAIN_NBYTES = 2 * lcm(FLOAT_UNIT_NBYTES, BLOCK_NBYTES)
"""Page sizes are multiples of this: every page border is then a place where spans of both kinds may be cut."""


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [first, stop) of a parameter, and the bytes [offset, offset + nbytes) of the address space they take."""

    first: int
    stop: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of one parameter's moment: `n_units` units of `unit_size` elements in `unit_nbytes` bytes."""

    start: int
    size: int
    """Elements of the parameter; the last unit may hold fewer than it could."""
    unit_size: int
    unit_nbytes: int

    @property
    def n_units(self) -> int:
        """Units, the last one possibly not full."""
        return -(-self.size // self.unit_size)

    @property
    def stop(self) -> int:
        """The first byte after the span."""
        return self.start + self.n_units * self.unit_nbytes

    def part(self, start: int, stop: int) -> Part | None:
        """Return what lies within bytes [start, stop), page borders both; None if that is nothing."""
        first_byte, stop_byte = max(start, self.start), min(stop, self.stop)
        if first_byte >= stop_byte:
            return None
        first_unit, spare = divmod(first_byte - self.start, self.unit_nbytes)
        n_units, spare_at_stop = divmod(stop_byte - first_byte, self.unit_nbytes)
        assert spare == spare_at_stop == 0, "a page border within a unit"
        first = first_unit * self.unit_size
        stop_element = min(first + n_units * self.unit_size, self.size)
        return Part(first, stop_element, first_byte, stop_byte - first_byte)


class PageLayout:
    """Spans one after the other; each batch of parameters starts at a page that no earlier one uses."""

    def __init__(self, page_nbytes: int) -> None:
        assert page_nbytes % PAGE_GRAIN_NBYTES == 0
        self.row_nbytes = page_nbytes // 2
        self.n_pages = 0

    def place(self, sizes_and_units: list[tuple[int, int, int]]) -> list[Span]:
        """Return a span for each (elements, unit_size, unit_nbytes), and count the pages that they take."""
        position = self.n_pages * self.row_nbytes
        spans = []
        for size, unit_size, unit_nbytes in sizes_and_units:
            start = -(-position // unit_nbytes) * unit_nbytes
            spans.append(Span(start, size, unit_size, unit_nbytes))
            position = spans[-1].stop
        self.n_pages = max(self.n_pages, -(-position // self.row_nbytes))
        return spans

    def pages(self, span: Span) -> range:
        """Return the numbers of the pages that a span touches; none for a span without bytes."""
        if span.start == span.stop:
            return range(0)
        return range(span.start // self.row_nbytes, -(-span.stop // self.row_nbytes))


def page_nbytes_near(nbytes: int) -> int:
    """Return the largest page size that is no more than `nbytes`, at least `PAGE_GRAIN_NBYTES`."""
    return max(1, nbytes // PAGE_GRAIN_NBYTES) * PAGE_GRAIN_NBYTES
