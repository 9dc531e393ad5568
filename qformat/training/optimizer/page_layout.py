"""Computes the position of each parameter's states in the pages: offsets only, no memory.

A page has one row for each of Adam's two moments. Row 0 of all pages, concatenated, is the address space of the first
moment, and row 1 that of the second. Both rows have the same layout:

              page 0            page 1            page 2
            ┌─────────────────┬─────────────────┬─────────────────┐
    row 0   │ p0 │ p1 │ p2    ·        p2       ·  p2 │ p3 │      │      first moment
            ├─────────────────┼─────────────────┼─────────────────┤
    row 1   │ p0 │ p1 │ p2    ·        p2       ·  p2 │ p3 │      │      second moment
            └─────────────────┴─────────────────┴─────────────────┘
                      └─────────── span of p2 ────────┘

A parameter has one span, so each of its moments is contiguous if its pages are adjacent in memory. Small parameters
share a page (p0, p1), and large ones cross several pages (p2).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

FLOAT_UNIT_NBYTES = 64
"""Size of a unit of float states. A tensor that is cut at multiples of 64 bytes gives the same bits in vector kernels
as the whole tensor: no supported instruction set has longer vectors, so both have the same scalar tail. The unit also
aligns every span."""

BLOCK_SIZE = 256
"""Number of elements per block of 8-bit states, as in bitsandbytes."""

BLOCK_NBYTES = BLOCK_SIZE + 4
"""Size of a block of 8-bit states in bytes: its codes, then its absmax as float32."""

PAGE_GRAIN_NBYTES = 2 * lcm(FLOAT_UNIT_NBYTES, BLOCK_NBYTES)
"""Page sizes are multiples of this number of bytes, so that a page boundary never falls within a unit or a block."""


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [first, stop) of a parameter in bytes [offset, offset + nbytes) of the address space."""

    first: int
    stop: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """Range of the address space that one moment of a parameter takes.

    Attributes:
        start: First byte.
        size: Number of elements in the parameter.
        unit_size: Number of elements per unit. The last unit may be partly filled.
        unit_nbytes: Size of a unit in bytes.
    """

    start: int
    size: int
    unit_size: int
    unit_nbytes: int

    @property
    def n_units(self) -> int:
        """Number of units, including a partly filled last one."""
        return -(-self.size // self.unit_size)

    @property
    def stop(self) -> int:
        """First byte after the span."""
        return self.start + self.n_units * self.unit_nbytes

    def part(self, start: int, stop: int) -> Part | None:
        """Return the part of the span within a range of pages.

        Args:
            start: First byte, a page boundary.
            stop: First byte after the range, a page boundary.

        Returns:
            The part, or None if it is empty.
        """
        first_byte, stop_byte = max(start, self.start), min(stop, self.stop)
        if first_byte >= stop_byte:
            return None
        first_unit, spare = divmod(first_byte - self.start, self.unit_nbytes)
        n_units, spare_at_stop = divmod(stop_byte - first_byte, self.unit_nbytes)
        assert spare == spare_at_stop == 0, "a page boundary falls within a unit"
        first = first_unit * self.unit_size
        stop_element = min(first + n_units * self.unit_size, self.size)
        return Part(first, stop_element, first_byte, stop_byte - first_byte)


class PageLayout:
    """Assigns spans in order. Each call of `place` starts at a new page.

    Args:
        page_nbytes: Size of a page in bytes, a multiple of `PAGE_GRAIN_NBYTES`.
    """

    def __init__(self, page_nbytes: int) -> None:
        assert page_nbytes % PAGE_GRAIN_NBYTES == 0
        self.row_nbytes = page_nbytes // 2
        self.n_pages = 0

    def place(self, sizes_and_units: list[tuple[int, int, int]]) -> list[Span]:
        """Return a span for each (size, unit_size, unit_nbytes) and add the pages that they need."""
        position = self.n_pages * self.row_nbytes
        spans = []
        for size, unit_size, unit_nbytes in sizes_and_units:
            start = -(-position // unit_nbytes) * unit_nbytes
            spans.append(Span(start, size, unit_size, unit_nbytes))
            position = spans[-1].stop
        self.n_pages = max(self.n_pages, -(-position // self.row_nbytes))
        return spans

    def pages(self, span: Span) -> range:
        """Return the numbers of the pages that a span touches. An empty span touches none."""
        if span.start == span.stop:
            return range(0)
        return range(span.start // self.row_nbytes, -(-span.stop // self.row_nbytes))


def page_nbytes_near(nbytes: int) -> int:
    """Return the largest page size of at most `nbytes`, but at least `PAGE_GRAIN_NBYTES`."""
    return max(1, nbytes // PAGE_GRAIN_NBYTES) * PAGE_GRAIN_NBYTES
