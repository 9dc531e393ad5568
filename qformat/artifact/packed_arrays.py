"""A packed weight in memory: the arrays of its components, and what they decode to (spec sections 3.2, 4 and 5).

Opening an artifact makes these records from a mapped file and must stay cheap, so that the numba kernels are imported
when something is encoded or decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component, PackedShape
from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK
from qformat.codec.floats import FloatFormat, Raw
from qformat.codec.nested import encode_absmax
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.codec.quant_state import QuantState

ReadComponent = Callable[[Component], NDArray[np.uint8]]
"""Gives the bytes of a component."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScales:
    """The scales of a packed weight as they are stored: those of all its blocks, or of a run of them.

    state: what the numbers mean. absmax: uint8 codes [n_blocks], or float32 [n_blocks] without double quantization.
    nested_absmax: float32 [n_nested_blocks] of the whole weight, and nested_quant_map: float32 [256]; both are None
    without double quantization. first_block: the block of the weight at which the run begins.
    """

    state: QuantState
    absmax: NDArray[Any]
    nested_absmax: NDArray[np.float32] | None = None
    nested_quant_map: NDArray[np.float32] | None = None
    first_block: int = 0

    @classmethod
    def from_bytes(cls, state: QuantState, read: ReadComponent, *, first_block: int = 0) -> BlockScales:
        """Take the scales from the bytes of their components; those of absmax may be of a run of blocks."""
        if state.nested_offset is None:
            return BlockScales(state=state, absmax=read(Component.ABSMAX).view("<f4"), first_block=first_block)
        return BlockScales(
            state=state,
            absmax=read(Component.ABSMAX),
            nested_absmax=read(Component.NESTED_ABSMAX).view("<f4"),
            nested_quant_map=read(Component.NESTED_QUANT_MAP).view("<f4"),
            first_block=first_block,
        )

    @property
    def layout(self) -> PackedShape:
        """Shape, float format and options of the whole weight."""
        return PackedShape.of_state(self.state)

    @property
    def second_level(self) -> tuple[NDArray[np.float32], NDArray[np.float32], np.float32] | None:
        """nested_absmax, nested_quant_map and the offset; None without double quantization."""
        if self.nested_absmax is None or self.nested_quant_map is None or self.state.nested_offset is None:
            return None
        return self.nested_absmax, self.nested_quant_map, np.float32(self.state.nested_offset)

    def scales(self) -> NDArray[np.float32]:
        """Return what a reader multiplies with: the decoded absmax of each block, float32 [n_blocks]."""
        if self.second_level is None:
            return self.absmax.astype(np.float32, copy=False)
        out = np.empty(self.absmax.size, np.float32)
        _kernels().decode_scales_into(self.absmax, *self.second_level, out, first_block=self.first_block)
        return out

    def largest_scale(self) -> float:
        """Return a number that no scale of the run exceeds in magnitude."""
        if self.second_level is None:
            return float(np.abs(self.absmax).max(initial=0))
        nested_absmax, nested_quant_map, offset = self.second_level
        largest = float(np.abs(nested_quant_map).max()) * float(np.abs(nested_absmax).max(initial=0))
        return 1.001 * (largest + abs(float(offset)))  # a margin for rounding

    def with_codes(self, packed: NDArray[np.uint8], *, first_block: int | None = None) -> PackedArrays:
        """Return codes uint8 [ceil(n/2)] with their scales; the codes begin at `first_block`, by default ours."""
        start = self.first_block if first_block is None else first_block
        n_elements = min(2 * packed.size, self.layout.n_elements - start * self.state.block_size)
        first = start - self.first_block
        return PackedArrays(
            state=self.state,
            packed=packed,
            absmax=self.absmax[first : first + block_count(n_elements, self.state.block_size)],
            nested_absmax=self.nested_absmax,
            nested_quant_map=self.nested_quant_map,
            first_block=start,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedArrays(BlockScales):
    """Codes and scales of a packed weight, or of a run of its blocks. packed: uint8 [ceil(n/2)]."""

    packed: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.state.shape

    def decode_into(self, out: Raw, float_format: FloatFormat | None = None) -> None:
        """Decode all elements of the run, as a reader does, into `out` [n].

        float_format: of `out`'s raw elements, by default what the source was.
        Raises UsageError for arrays that do not fit together.
        """
        float_format = float_format or self.state.float_format
        block_size = self.state.block_size
        if self.second_level is None:
            _kernels().decode_into(
                self.packed,
                self.absmax.astype(np.float32, copy=False),
                n_elements=out.size,
                block_size=block_size,
                float_format=float_format,
                out=out,
            )
            return
        nested_absmax, nested_quant_map, offset = self.second_level
        _kernels().decode_nested_into(
            self.packed,
            self.absmax,
            nested_absmax,
            offset,
            n_elements=out.size,
            block_size=block_size,
            float_format=float_format,
            out=out,
            nested_quant_map=nested_quant_map,
            first_block=self.first_block,
        )

    def decode(self, float_format: FloatFormat | None = None, out: Raw | None = None) -> Raw:
        """Return the whole weight in its shape: raw elements of `float_format` (default: what the source was).

        bf16 comes as its bits in uint16, fp16 as its bits in uint16, fp32 as float32. `out`: a flat buffer to reuse.
        """
        float_format = float_format or self.state.float_format
        if out is None:
            out = np.empty(self.layout.n_elements, float_format.raw_dtype)
        self.decode_into(out, float_format)
        return out.reshape(self.shape)

    def components(self) -> dict[Component, NDArray[Any]]:
        """Return every component of the whole weight, as its bytes lie in a shard."""
        parts: dict[Component, NDArray[Any]] = {Component.PACKED: self.packed, Component.ABSMAX: self.absmax}
        if self.nested_absmax is not None and self.nested_quant_map is not None:
            parts[Component.NESTED_ABSMAX] = self.nested_absmax
            parts[Component.NESTED_QUANT_MAP] = self.nested_quant_map
        parts[Component.QUANT_MAP] = NF4_CODEBOOK
        parts[Component.QUANT_STATE] = np.frombuffer(self.state.to_padded_json(), np.uint8)
        return parts


def store_scales(scales: NDArray[np.float32], layout: PackedShape) -> BlockScales:
    """Return scales float32 [n_blocks] of a whole weight as an artifact stores them."""
    if not layout.double_quant:
        return BlockScales(state=layout.state(nested_offset=None), absmax=scales)
    nested = encode_absmax(scales)
    return BlockScales(
        state=layout.state(nested_offset=float(nested.offset)),
        absmax=nested.codes,
        nested_absmax=nested.nested_absmax,
        nested_quant_map=DYNAMIC_MAP,
    )


def encode_plain(raw: Raw, layout: PackedShape) -> PackedArrays:
    """Encode finite raw weights [n] as a writer does by default: a scale is its block's largest magnitude."""
    packed = np.empty(packed_nbytes(layout.n_elements), np.uint8)
    absmax = np.empty(layout.n_blocks, np.float32)
    _kernels().encode_into(raw, layout.float_format, block_size=layout.block_size, packed=packed, absmax=absmax)
    return store_scales(absmax, layout).with_codes(packed)


def _kernels() -> Any:
    from qformat.codec.cpu import blocks

    return blocks
