"""Packed weights in memory: the arrays of their components, encoding and decoding (spec sections 3.2, 4 and 5).

The numba kernels are imported on the first use, because opening an artifact creates these records and must stay fast.
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
"""Function that returns the bytes of a component."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScales:
    """Stored scales of a packed weight, for all of its blocks or for a run of consecutive blocks.

    Attributes:
        state: quant_state of the weight.
        absmax: Codes of the absmax values, uint8 [n_blocks]; without double quantization the absmax values, float32
            [n_blocks].
        nested_absmax: Nested absmax values of the entire weight, float32 [n_nested_blocks]; None without double
            quantization.
        nested_quant_map: Codebook of the absmax values, float32 [256]; None without double quantization.
        first_block: Index of the run's first block in the weight.
    """

    state: QuantState
    absmax: NDArray[Any]
    nested_absmax: NDArray[np.float32] | None = None
    nested_quant_map: NDArray[np.float32] | None = None
    first_block: int = 0

    @classmethod
    def from_bytes(cls, state: QuantState, read: ReadComponent, *, first_block: int = 0) -> BlockScales:
        """Return the scales whose components have the given bytes.

        Args:
            state: quant_state of the weight.
            read: Function that returns the bytes of a component. Those of absmax may belong to a run of blocks.
            first_block: Index of the run's first block in the weight.
        """
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
        """Shape, float format and options of the entire weight."""
        return PackedShape.of_state(self.state)

    @property
    def second_level(self) -> tuple[NDArray[np.float32], NDArray[np.float32], np.float32] | None:
        """Nested absmax values, their codebook and the nested offset; None without double quantization."""
        if self.nested_absmax is None or self.nested_quant_map is None or self.state.nested_offset is None:
            return None
        return self.nested_absmax, self.nested_quant_map, np.float32(self.state.nested_offset)

    def scales(self) -> NDArray[np.float32]:
        """Return the decoded absmax of each block, float32 [n_blocks]."""
        if self.second_level is None:
            return self.absmax.astype(np.float32, copy=False)
        out = np.empty(self.absmax.size, np.float32)
        _kernels().decode_scales_into(self.absmax, *self.second_level, out, first_block=self.first_block)
        return out

    def largest_scale(self) -> float:
        """Return an upper bound of the magnitudes of the run's scales."""
        if self.second_level is None:
            return float(np.abs(self.absmax).max(initial=0))
        nested_absmax, nested_quant_map, offset = self.second_level
        largest = float(np.abs(nested_quant_map).max()) * float(np.abs(nested_absmax).max(initial=0))
        return 1.001 * (largest + abs(float(offset)))  # includes a margin for rounding

    def with_codes(self, packed: NDArray[np.uint8], *, first_block: int | None = None) -> PackedArrays:
        """Return packed codes together with their scales.

        Args:
            packed: Packed codes, uint8 [ceil(n / 2)].
            first_block: Index of the codes' first block in the weight, by default the first block of the scales.
        """
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
    """Codes and scales of a packed weight or of a run of its blocks.

    Attributes:
        packed: Packed codes, uint8 [ceil(n / 2)].
    """

    packed: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.state.shape

    def decode_into(self, out: Raw, float_format: FloatFormat | None = None) -> None:
        """Decode all elements of the run.

        Args:
            out: Array for the raw elements [n].
            float_format: Float format of `out`, by default that of the source tensor.

        Raises:
            UsageError: The sizes of the arrays do not match.
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
        """Return the decoded weight in its shape, as raw elements.

        Args:
            float_format: Float format of the result, by default that of the source tensor. Elements in bfloat16 and
                float16 are returned as their bits in uint16, elements in float32 as float32.
            out: Array for the elements [n]. Allocated if omitted.
        """
        float_format = float_format or self.state.float_format
        if out is None:
            out = np.empty(self.layout.n_elements, float_format.raw_dtype)
        self.decode_into(out, float_format)
        return out.reshape(self.shape)

    def components(self) -> dict[Component, NDArray[Any]]:
        """Return every component of the entire weight, with the bytes that a shard contains."""
        parts: dict[Component, NDArray[Any]] = {Component.PACKED: self.packed, Component.ABSMAX: self.absmax}
        if self.nested_absmax is not None and self.nested_quant_map is not None:
            parts[Component.NESTED_ABSMAX] = self.nested_absmax
            parts[Component.NESTED_QUANT_MAP] = self.nested_quant_map
        parts[Component.QUANT_MAP] = NF4_CODEBOOK
        parts[Component.QUANT_STATE] = np.frombuffer(self.state.to_padded_json(), np.uint8)
        return parts


def store_scales(scales: NDArray[np.float32], layout: PackedShape) -> BlockScales:
    """Return the scales of a weight in the form that an artifact stores.

    Args:
        scales: Scales of all blocks, float32 [n_blocks].
        layout: Shape, float format and options of the weight.
    """
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
    """Encode a weight with the default scales: the largest magnitude of each block (spec section 4.2).

    Args:
        raw: Raw elements of the weight [n], all finite.
        layout: Shape, float format and options of the weight.
    """
    packed = np.empty(packed_nbytes(layout.n_elements), np.uint8)
    absmax = np.empty(layout.n_blocks, np.float32)
    _kernels().encode_into(raw, layout.float_format, block_size=layout.block_size, packed=packed, absmax=absmax)
    return store_scales(absmax, layout).with_codes(packed)


def _kernels() -> Any:
    from qformat.codec.cpu import blocks

    return blocks
