"""What must hold of weights whose codes were chosen on a text: nobody can choose them again without it.

Error feedback moves a weight by what the ones before it lost, so that neither code nor scale follows from the source
alone. What is known is that the result is near: on SmolLM2-135M the relative RMS error of a weight is 9.3 to 15.3%
(encoding gives 9.4%) and a block's scale 0.64 to 1.57 times its largest magnitude. The bounds leave room for inputs
that are more strongly correlated and for tuning; a weight of other values, or in another order, is far outside.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.manifest import JsonObject
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.nested import NESTED_BLOCK_SIZE

MAX_RELATIVE_RMS = 0.5
"""Of a weight's error."""

SMALLEST_FACTOR, LARGEST_FACTOR = np.float32(0.25), np.float32(4)
"""Of a scale, in its block's largest magnitudes; half a step of the second level is allowed beside it."""

MAX_SHARE_FAR = 0.01
"""Of a weight's scales that may be outside: where a block is tiny beside its neighbours, feedback has the last word."""

_HALF_STEP = np.float32(np.diff(DYNAMIC_MAP).max() / 2)


def not_chosen(recipe: JsonObject) -> frozenset[str] | None:
    """Return the weights of a calibrated artifact that are encoded as ever; None for one that is not calibrated."""
    calibration = recipe.get("calibration")
    if not isinstance(calibration, dict):
        return None
    plain = calibration.get("plain")
    return frozenset(plain) if isinstance(plain, dict) else frozenset()


def count_far_scales(
    scales: NDArray[np.float32], nested_absmax: NDArray[np.float32] | None, absmax: NDArray[np.float32]
) -> int:
    """Return how many scales [n_blocks], as readers decode them, are far from the largest magnitudes of the blocks."""
    step = np.zeros_like(absmax)
    if nested_absmax is not None:
        step = np.repeat(_HALF_STEP * np.abs(nested_absmax), NESTED_BLOCK_SIZE)[: absmax.size]
    near = (scales >= SMALLEST_FACTOR * absmax - step) & (scales <= LARGEST_FACTOR * absmax + step)
    return int(np.count_nonzero(~near))
