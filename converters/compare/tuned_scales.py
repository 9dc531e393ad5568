"""What must hold of the scales of a tuned artifact: each within a stated share of the one that encoding gives.

Tuning multiplies the scale that the artifact had by 1 - c to 1 + c, c as the recipe says, and stores the product: with
double quantization, at most half a step of the second level's map away, of which 1 is the group's nested absmax.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.manifest import JsonObject
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.nested import NESTED_BLOCK_SIZE, decode_absmax, encode_absmax

_HALF_STEP = np.float32(np.diff(DYNAMIC_MAP).max() / 2)
_ROUNDING = np.float32(1e-6)
"""Of a few float32 operations, relative."""


def scale_change(recipe: JsonObject) -> float | None:
    """Return the share by which the recipe says that scales may have changed, None where nothing was tuned."""
    tuning = recipe.get("tuning")
    change = tuning.get("scale_change") if isinstance(tuning, dict) else None
    return float(change) if isinstance(change, (int, float)) and 0 <= change < 1 else None


def count_too_far(
    scales: NDArray[np.float32], nested_absmax: NDArray[np.float32] | None, absmax: NDArray[np.float32], change: float
) -> int:
    """Return how many scales [n_blocks], as readers decode them, are further from what absmax [n_blocks] gives.

    nested_absmax: of the tuned scales, None without double quantization.
    """
    start, step = absmax, np.zeros_like(absmax)
    if nested_absmax is not None:
        plain = encode_absmax(absmax)
        start = decode_absmax(plain.codes, plain.nested_absmax, plain.offset)
        step = np.repeat(_HALF_STEP * np.abs(nested_absmax), NESTED_BLOCK_SIZE)[: absmax.size]
        step += _ROUNDING * np.abs(nested_absmax).max(initial=0)
    allowed = change * np.abs(start) * (1 + _ROUNDING) + step + _ROUNDING * np.abs(scales)
    return int(np.count_nonzero(~(np.abs(scales - start) <= allowed)))
