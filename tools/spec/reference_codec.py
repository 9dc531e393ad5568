"""Encode and decode vectors with the reference codec, never with the fast kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component, PackedShape
from qformat.artifact.packed_arrays import PackedArrays, store_scales
from qformat.codec import nf4
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import decode_absmax
from qformat.codec.quant_state import QuantState

BF16, F16, F32 = FloatFormat.BF16, FloatFormat.F16, FloatFormat.F32

Floats = NDArray[np.float32]
JsonObject = dict[str, Any]


def reference_decode(arrays: PackedArrays, float_format: FloatFormat) -> Raw:
    """Decode components with the reference codec."""
    with np.errstate(over="ignore", invalid="ignore"):
        scales = arrays.absmax
        if arrays.second_level is not None:
            nested_absmax, nested_quant_map, offset = arrays.second_level
            scales = decode_absmax(arrays.absmax, nested_absmax, offset, nested_quant_map=nested_quant_map)
        layout = arrays.layout
        values = nf4.decode(arrays.packed, scales, n_elements=layout.n_elements, block_size=layout.block_size)
        return narrow(values, float_format)


def component_bytes(arrays: PackedArrays) -> dict[Component, bytes]:
    return {part: data.tobytes() for part, data in arrays.components().items()}


def encode(
    raw: Raw, float_format: FloatFormat, shape: Sequence[int], block_size: int, double_quant: bool
) -> PackedArrays:
    """Encode raw values with the reference codec."""
    layout = PackedShape(tuple(shape), float_format, block_size, double_quant)
    assert layout.n_elements == raw.size
    packed, absmax = nf4.encode(widen(raw, float_format), block_size=block_size)
    return store_scales(absmax, layout).with_codes(packed)


def stored(
    state: QuantState,
    packed: NDArray[np.uint8],
    absmax: NDArray[Any],
    nested_absmax: Floats | None = None,
    nested_quant_map: Floats | None = None,
) -> PackedArrays:
    """Return a packed tensor with components that no encoder chose."""
    return PackedArrays(
        state=state, packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_quant_map=nested_quant_map
    )


def raw_of(values: Any, float_format: FloatFormat) -> Raw:
    return narrow(np.asarray(values, np.float32).reshape(-1), float_format)


def neighbours(values: Floats) -> Floats:
    """Return each value with the next smaller and the next larger float32."""
    infinity = np.float32(np.inf)
    return np.stack([np.nextafter(values, -infinity), values, np.nextafter(values, infinity)], axis=1).reshape(-1)
