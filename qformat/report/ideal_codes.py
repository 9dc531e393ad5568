"""Expected share of each NF4 code if the weights were independent and normally distributed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qformat.codec.codebooks import NF4_THRESHOLDS

_LARGEST_ABSMAX = 9.0
"""Upper limit of the integration in standard deviations. One block of 256 weights in 10^16 exceeds it."""

_STEPS = 1800
"""Points of the trapezoid rule, 0.005 standard deviations apart. Ten times as many change no share by 1e-15."""


def gaussian_code_shares(block_size: int) -> NDArray[np.float64]:
    """Return the expected share of each code, float64 [16], in full blocks of independent normal weights.

    The absmax M of a block of n weights has the density n (2 Phi(m) - 1)^(n-1) 2 phi(m). One weight in n is the absmax
    itself and scales to 1 or -1 (code 15 or 0). The others follow a normal distribution truncated at -M and M, so the
    share between thresholds s and t is (Phi(t M) - Phi(s M)) / (2 Phi(M) - 1). The trapezoid rule averages it over M.
    """
    absmax = np.linspace(0, _LARGEST_ABSMAX, _STEPS + 1)[1:]
    inside = 2 * _normal_cdf(absmax) - 1
    density = block_size * inside ** (block_size - 1) * 2 * np.exp(-(absmax**2) / 2) / math.sqrt(2 * math.pi)
    density /= density.sum()
    bounds = np.concatenate(([-1.0], NF4_THRESHOLDS.astype(np.float64), [1.0]))
    below = _normal_cdf(bounds[:, None] * absmax)  # [17, absmax]
    shares: NDArray[np.float64] = ((below[1:] - below[:-1]) / inside) @ density  # [16]
    shares *= (block_size - 1) / block_size
    shares[[0, 15]] += 0.5 / block_size
    return shares


def expected_shares(weights_by_block_size: Mapping[int, int]) -> NDArray[np.float64]:
    """Return the expected shares of a whole model, float64 [16], from its number of weights per block size.

    Without weights, all shares are zero.
    """
    shares = np.zeros(16)
    for block_size, n_weights in sorted(weights_by_block_size.items()):
        shares += gaussian_code_shares(block_size) * n_weights
    return shares / max(sum(weights_by_block_size.values()), 1)


def _normal_cdf(values: NDArray[np.float64]) -> NDArray[np.float64]:
    flat = [0.5 * math.erfc(-value / math.sqrt(2)) for value in values.reshape(-1).tolist()]
    return np.array(flat).reshape(values.shape)
