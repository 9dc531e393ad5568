"""Bounds for weights whose codes were chosen on a text, because they cannot be recomputed without that text.

Error feedback moves each weight to compensate for the errors of the ones before it, so neither codes nor scales follow
from the source alone. The result is still near the source: on SmolLM2-135M the relative RMS error of a weight is 9.3 to
15.3% (plain encoding gives 9.4%), and a block's scale is 0.64 to 1.57 times its largest magnitude. The bounds leave
room for more strongly correlated inputs and for tuning; a weight with other values, or in another order, is far
outside.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.manifest import JsonObject
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.nested import NESTED_BLOCK_SIZE

MAX_RELATIVE_RMS = 0.5
"""Largest relative RMS error of a weight."""

SMALLEST_FACTOR, LARGEST_FACTOR = np.float32(0.25), np.float32(4)
"""Bounds of a scale as multiples of its block's absmax. Half a step of the second level is allowed in addition."""

MAX_SHARE_FAR = 0.01
"""Largest share of a weight's scales outside the bounds: feedback dominates in blocks that are tiny beside others."""

_HALF_STEP = np.float32(np.diff(DYNAMIC_MAP).max() / 2)


def not_chosen(recipe: JsonObject) -> frozenset[str] | None:
    """Return the weights of a calibrated artifact that were encoded plainly, or None if it is not calibrated."""
    calibration = recipe.get("calibration")
    if not isinstance(calibration, dict):
        return None
    plain = calibration.get("plain")
    return frozenset(plain) if isinstance(plain, dict) else frozenset()


def count_far_scales(
    scales: NDArray[np.float32], nested_absmax: NDArray[np.float32] | None, absmax: NDArray[np.float32]
) -> int:
    """Return how many scales are far from the absmax values of their blocks.

    Args:
        scales: Scales as readers decode them, float32 [n_blocks].
        nested_absmax: Nested absmax values, float32 [n_blocks / 256, rounded up], or None without double quantization.
        absmax: Absmax values of the source, float32 [n_blocks].
    """
    step = np.zeros_like(absmax)
    if nested_absmax is not None:
        step = np.repeat(_HALF_STEP * np.abs(nested_absmax), NESTED_BLOCK_SIZE)[: absmax.size]
    near = (scales >= SMALLEST_FACTOR * absmax - step) & (scales <= LARGEST_FACTOR * absmax + step)
    return int(np.count_nonzero(~near))
