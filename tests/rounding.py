"""How far floating point may lie from exact numbers: bounds that hold on every machine, or a yardstick where none does.

A sum of n products in any order, with or without fused steps, lies within `sum_error(n)` times the sum of the products'
magnitudes of the exact one (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import math

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


def log_softmax_error(logits: Tensor, off: float = 0.0) -> Tensor:
    """Return how far the log-softmax in float32 of logits [..., V] may lie from exact: one bound a row, [..., 1].

    off: how far the logits themselves may lie from exact; all of them move a result by at most twice that. The logits
    less the largest are rounded, and their exponentials are off by up to two units; the sum of these by `sum_error(V)`.
    The logarithm, at most log V, and the two subtractions are rounded.
    """
    n, unit = logits.shape[-1], torch.finfo(torch.float32).eps
    spread = logits.double().amax(-1, keepdim=True) - logits.double().amin(-1, keepdim=True)
    return 2 * off + sum_error(n + 4) + 2 * unit * (spread + math.log(n))


def kl_error(teacher: Tensor, student: Tensor, off: float = 0.0) -> Tensor:
    """Return how far the KL in float32 of logits [..., V] may lie from exact, [...].

    The KL is the sum of p (log p - log q). An error of log p is a relative one of p.
    """
    log_p, log_q = torch.log_softmax(teacher.double(), -1), torch.log_softmax(student.double(), -1)
    of_p, of_q = log_softmax_error(teacher, off), log_softmax_error(student, off)
    p = log_p.exp()
    products = (of_p + sum_error(log_p.shape[-1] + 4)) * (log_p - log_q).abs() + of_p + of_q
    return (p * products).sum(-1)
