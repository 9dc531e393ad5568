"""Reference implementation of double quantization: absmax values as 8-bit codes (spec section 5; QLoRA, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.codec.codebooks import DYNAMIC_MAP, DYNAMIC_THRESHOLDS

NESTED_BLOCK_SIZE = 256
"""Number of absmax values that share one nested absmax."""


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """Quantized absmax values of one tensor.

    Attributes:
        codes: Codes of the absmax values, uint8 [n_blocks].
        nested_absmax: Nested absmax values, float32 [ceil(n_blocks / 256)].
        offset: Mean of the absmax values.
    """

    codes: NDArray[np.uint8]
    nested_absmax: NDArray[np.float32]
    offset: np.float32


def encode_absmax(absmax: NDArray[np.float32]) -> NestedAbsmax:
    """Encode absmax values, float32 [n_blocks]. Their mean is summed in float64, in index order."""
    if absmax.size == 0:
        return NestedAbsmax(np.empty(0, np.uint8), np.empty(0, np.float32), np.float32(0))
    total = np.cumsum(absmax, dtype=np.float64)[-1]  # cumsum adds in index order, unlike the pairwise sum()
    offset = np.float32(total / absmax.size)
    centered = absmax - offset
    starts = np.arange(0, absmax.size, NESTED_BLOCK_SIZE)
    nested_absmax = np.maximum.reduceat(np.abs(centered), starts)
    divisor = np.repeat(nested_absmax, NESTED_BLOCK_SIZE)[: absmax.size]
    with np.errstate(invalid="ignore"):
        codes = np.searchsorted(DYNAMIC_THRESHOLDS, centered / divisor, side="left")
    codes[divisor == 0] = 0
    return NestedAbsmax(codes.astype(np.uint8), nested_absmax, offset)


def decode_absmax(
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    offset: np.float32,
    *,
    nested_quant_map: NDArray[np.float32] = DYNAMIC_MAP,
) -> NDArray[np.float32]:
    """Decode absmax values, float32 [n_blocks]. The product and the sum are each rounded to float32.

    Args:
        codes: Codes of the absmax values, uint8 [n_blocks].
        nested_absmax: Nested absmax values, float32 [ceil(n_blocks / 256)].
        offset: Mean of the absmax values.
        nested_quant_map: Codebook, float32 [256].
    """
    scale = np.repeat(nested_absmax, NESTED_BLOCK_SIZE)[: codes.size]
    return nested_quant_map[codes] * scale + offset
