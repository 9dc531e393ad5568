"""Means and their standard errors over windows: tokens of one window are correlated, windows nearly independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.strict_json import Json


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error.

    Attributes:
        mean: The mean.
        standard_error: Its standard error. None for a single window.
    """

    mean: float
    standard_error: float | None

    def to_json(self) -> dict[str, Json]:
        """Return both values, rounded to six significant digits because further digits differ between machines."""
        return {"mean": _rounded(self.mean), "standard_error": _rounded(self.standard_error)}

    def exponential(self) -> Estimate:
        """Return the estimate of the exponential, such as a perplexity, with a linearised standard error."""
        mean = math.exp(self.mean)
        return Estimate(mean, None if self.standard_error is None else mean * self.standard_error)


def estimate(values: NDArray[np.floating] | NDArray[np.bool_]) -> Estimate:
    """Return the mean of values [n_windows, n_positions] with the standard error over windows.

    For paired values, such as the losses of two models on the same tokens, pass their differences.
    """
    by_window = values.mean(axis=1, dtype=np.float64)
    n_windows = len(by_window)
    error = float(by_window.std(ddof=1)) / math.sqrt(n_windows) if n_windows > 1 else None
    return Estimate(float(by_window.mean()), error)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
