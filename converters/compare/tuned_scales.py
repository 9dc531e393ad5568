"""Bounds for the scales of a tuned artifact: each must be within a stated share of the encoded one.

Tuning multiplies a scale by a factor between 1 - c and 1 + c, where the recipe states c, and stores the product. With
double quantization, storing adds an error of up to half a step of the second level's map, relative to the nested
absmax.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.manifest import JsonObject
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.nested import NESTED_BLOCK_SIZE, decode_absmax, encode_absmax

_HALF_STEP = np.float32(np.diff(DYNAMIC_MAP).max() / 2)
_ROUNDING = np.float32(1e-6)
"""Relative rounding error of a few float32 operations."""


def scale_change(recipe: JsonObject) -> float | None:
    """Return the share by which scales may have changed according to the recipe. None if nothing was tuned."""
    tuning = recipe.get("tuning")
    change = tuning.get("scale_change") if isinstance(tuning, dict) else None
    return float(change) if isinstance(change, (int, float)) and 0 <= change < 1 else None


def count_too_far(
    scales: NDArray[np.float32], nested_absmax: NDArray[np.float32] | None, absmax: NDArray[np.float32], change: float
) -> int:
    """Return how many scales differ from the encoded ones by more than tuning allows.

    Args:
        scales: Tuned scales as readers decode them, float32 [n_blocks].
        nested_absmax: Nested absmax values of the tuned scales, float32, or None without double quantization.
        absmax: Absmax values of the source, float32 [n_blocks].
        change: Share by which tuning may change a scale, such as 0.25.
    """
    start, step = absmax, np.zeros_like(absmax)
    if nested_absmax is not None:
        plain = encode_absmax(absmax)
        start = decode_absmax(plain.codes, plain.nested_absmax, plain.offset)
        step = np.repeat(_HALF_STEP * np.abs(nested_absmax), NESTED_BLOCK_SIZE)[: absmax.size]
        step += _ROUNDING * np.abs(nested_absmax).max(initial=0)
    allowed = change * np.abs(start) * (1 + _ROUNDING) + step + _ROUNDING * np.abs(scales)
    return int(np.count_nonzero(~(np.abs(scales - start) <= allowed)))
