"""The scales of a packed weight as they lie in a file: decoding with them, and counting in how many two sets differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component, PackedShape
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.cpu.blocks import add_in_order, decode_into, decode_scales_into, encode_absmax_into
from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count
from qformat.codec.quant_state import QuantState
from qformat.converters.encode.task_writer import ABSMAX_CHUNK


@dataclass(frozen=True, slots=True)
class StoredScales:
    """The scales of a packed tensor, under the names that their reader has for them."""

    state: QuantState
    absmax: NDArray[Any]
    nested_absmax: NDArray[np.float32] | None
    nested_quant_map: NDArray[np.float32] | None

    @classmethod
    def read(cls, state: QuantState, read: Callable[[Component], NDArray[np.uint8]]) -> StoredScales:
        """Read the components that there are; `read` gives a component's bytes."""
        nested = state.nested_offset is not None
        return cls(
            state=state,
            absmax=read(Component.ABSMAX).view("u1" if nested else "<f4"),
            nested_absmax=read(Component.NESTED_ABSMAX).view("<f4") if nested else None,
            nested_quant_map=read(Component.NESTED_QUANT_MAP).view("<f4") if nested else None,
        )

    def decoded(self) -> NDArray[np.float32]:
        """Return the scales that a reader multiplies with, float32 [n_blocks]."""
        if self.nested_absmax is None or self.nested_quant_map is None:
            return self.absmax
        assert self.state.nested_offset is not None
        out = np.empty(self.absmax.size, np.float32)
        offset = np.float32(self.state.nested_offset)
        decode_scales_into(self.absmax, self.nested_absmax, self.nested_quant_map, offset, out)
        return out

    def decode(
        self,
        layout: PackedShape,
        codes: NDArray[np.uint8],
        start: int,
        n_elements: int,
        *,
        scratch: NDArray[np.float32],
        out: Raw,
    ) -> None:
        """Decode codes that begin at element `start` (of a block), as a reader does, into `out` [n_elements]."""
        blocks = slice(start // layout.block_size, block_count(start + n_elements, layout.block_size))
        scales = self.absmax[blocks]
        if self.nested_absmax is not None and self.nested_quant_map is not None:
            assert self.state.nested_offset is not None
            decoded = scratch[: scales.size]
            decode_scales_into(
                scales,
                self.nested_absmax,
                self.nested_quant_map,
                np.float32(self.state.nested_offset),
                decoded,
                first_block=blocks.start,
            )
            scales = decoded
        decode_into(
            codes,
            scales,
            n_elements=n_elements,
            block_size=layout.block_size,
            float_format=layout.float_format,
            out=out,
        )

    def count_different(self, expected: StoredScales) -> int:
        """Return how many stored numbers are not those of another file."""
        n_different = int(self.state != expected.state) + count_different(self.absmax, expected.absmax)
        for found, wanted in (
            (self.nested_absmax, expected.nested_absmax),
            (self.nested_quant_map, expected.nested_quant_map),
        ):
            if found is not None and wanted is not None:
                n_different += count_different(found, wanted)
        return n_different

    def count_wrong(self, absmax: Raw, float_format: FloatFormat) -> int:
        """Return how many stored numbers are not what absmax values [n_blocks] of the source give."""
        nested_absmax, nested_map = self.nested_absmax, self.nested_quant_map
        if nested_absmax is None or nested_map is None:
            return sum(
                count_different(self.absmax[start : start + values.size], values)
                for start, values in _absmax_chunks(absmax, float_format)
            )
        total = 0.0
        for _, values in _absmax_chunks(absmax, float_format):
            total = add_in_order(values, total)
        offset = np.float32(total / absmax.size if absmax.size else 0)
        n_wrong = int(self.state.nested_offset != float(offset)) + count_different(nested_map, DYNAMIC_MAP)
        for start, values in _absmax_chunks(absmax, float_format):
            codes = np.empty(values.size, np.uint8)
            nested = np.empty(block_count(values.size, NESTED_BLOCK_SIZE), np.float32)
            encode_absmax_into(values, offset, codes=codes, nested_absmax=nested)
            group = start // NESTED_BLOCK_SIZE
            n_wrong += count_different(self.absmax[start : start + values.size], codes)
            n_wrong += count_different(nested_absmax[group : group + nested.size], nested)
        return n_wrong


def count_different(found: NDArray[Any], expected: NDArray[Any]) -> int:
    """Return in how many elements two arrays of equal size differ, bit for bit."""
    if found.dtype.kind == "f":
        found, expected = found.view(np.uint32), expected.view(np.uint32)
    return 0 if np.array_equal(found, expected) else int(np.count_nonzero(found != expected))


def count_different_codes(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> int:
    """Return how many of the codes in packed bytes differ, the padding of an odd tensor counted as a code."""
    if np.array_equal(found, expected):
        return 0
    changed = found ^ expected
    return int(np.count_nonzero(changed >> 4) + np.count_nonzero(changed & 15))


def _absmax_chunks(absmax: Raw, float_format: FloatFormat) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, absmax.size, ABSMAX_CHUNK):
        yield start, widen(absmax[start : start + ABSMAX_CHUNK], float_format)
