"""How far floating point may lie from exact numbers: bounds that hold on every machine, or a yardstick where none does.

A sum of n products in any order, with or without fused steps, lies within `sum_error(n)` times the sum of the products'
magnitudes of the exact one (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def sum_error(n: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest error of a sum of n products, as a share of the sum of their magnitudes.

    Twice that of rounding to nearest: instructions for dot products of bf16 may cut bits off, and no order is assumed.
    """
    unit = torch.finfo(dtype).eps
    return n * unit / (1 - n * unit)


def distance(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of the exact one."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def rounds_like(found: Tensor, peer: Tensor, exact: Tensor) -> bool:
    """Whether `found` lies as near to the same computation in float32 as the peer's does.

    For chains of operations in 16 bit, whose worst case says nothing. What rounds as often as the peer, in another
    order, makes an independent error of the same size; a factor of 2 is far outside of what the order can do to a norm
    over many numbers. What rounds less often lies nearer.
    """
    return distance(found, exact) <= 2 * distance(peer, exact)
