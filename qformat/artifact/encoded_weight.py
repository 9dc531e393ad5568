"""A weight that is encoded, in memory: codes and scales, however they were chosen, and the components they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component, PackedShape
from qformat.codec import quant_state
from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK
from qformat.codec.cpu.blocks import decode_into, encode_into
from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.nested import NestedAbsmax, decode_absmax, encode_absmax
from qformat.codec.nf4 import packed_nbytes
from qformat.codec.quant_state import QuantState


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """Codes and scales of one weight.

    packed: uint8 [ceil(n/2)]. stored: the scales as the artifact has them, float32 [n_blocks] or double-quantized.
    """

    packed: NDArray[np.uint8]
    stored: NDArray[np.float32] | NestedAbsmax

    @property
    def scales(self) -> NDArray[np.float32]:
        """The scales that a reader multiplies with, float32 [n_blocks]."""
        return decoded_scales(self.stored)

    def decode(self, layout: PackedShape) -> Raw:
        """Return the weights as a reader gets them: raw elements [n] of the layout's float format."""
        out: Raw = np.empty(layout.n_elements, layout.float_format.raw_dtype)
        decode_into(
            self.packed,
            self.scales,
            n_elements=layout.n_elements,
            block_size=layout.block_size,
            float_format=layout.float_format,
            out=out,
        )
        return out

    def components(self, layout: PackedShape) -> dict[Component, NDArray[Any]]:
        """Return every component of the packed tensor, as its bytes lie in a shard."""
        stored, offset = self.stored, None
        parts: dict[Component, NDArray[Any]] = {Component.PACKED: self.packed, Component.QUANT_MAP: NF4_CODEBOOK}
        if isinstance(stored, NestedAbsmax):
            offset = float(stored.offset)
            parts[Component.ABSMAX] = stored.codes
            parts[Component.NESTED_ABSMAX] = stored.nested_absmax
            parts[Component.NESTED_QUANT_MAP] = DYNAMIC_MAP
        else:
            parts[Component.ABSMAX] = stored
        state = QuantState(layout.block_size, layout.float_format, layout.shape, offset)
        parts[Component.QUANT_STATE] = np.frombuffer(state.to_padded_json(), np.uint8)
        return parts


def from_components(parts: Mapping[Component, NDArray[np.uint8]], *, path: Path, tensor: str) -> EncodedWeight:
    """Return the weight that the bytes of components hold. Raises ArtifactError if the quant_state cannot be read."""
    state = quant_state.parse(parts[Component.QUANT_STATE].tobytes(), path=path, tensor=tensor)
    packed, absmax = parts[Component.PACKED], parts[Component.ABSMAX]
    if state.nested_offset is None:
        return EncodedWeight(packed, absmax.view("<f4"))
    nested_absmax = parts[Component.NESTED_ABSMAX].view("<f4")
    return EncodedWeight(packed, NestedAbsmax(absmax, nested_absmax, np.float32(state.nested_offset)))


def store_scales(scales: NDArray[np.float32], *, double_quant: bool) -> NDArray[np.float32] | NestedAbsmax:
    """Return scales float32 [n_blocks] as an artifact stores them."""
    return encode_absmax(scales) if double_quant else scales


def decoded_scales(stored: NDArray[np.float32] | NestedAbsmax) -> NDArray[np.float32]:
    """Return stored scales as a reader decodes them, float32 [n_blocks]."""
    if isinstance(stored, NestedAbsmax):
        return decode_absmax(stored.codes, stored.nested_absmax, stored.offset)
    return stored


def encode_plain(raw: Raw, layout: PackedShape) -> EncodedWeight:
    """Encode finite raw weights [n] as a writer does by default: a scale is its block's largest magnitude."""
    packed = np.empty(packed_nbytes(layout.n_elements), np.uint8)
    absmax = np.empty(layout.n_blocks, np.float32)
    encode_into(raw, layout.float_format, block_size=layout.block_size, packed=packed, absmax=absmax)
    return EncodedWeight(packed, store_scales(absmax, double_quant=layout.double_quant))


def to_float32(raw: NDArray[np.uint8], float_format: FloatFormat) -> NDArray[np.float32]:
    """Return the values of a tensor's bytes, float32 [n]."""
    return widen(raw.view(float_format.raw_dtype), float_format)
