"""Bounds of floating-point errors that hold on every machine, and a comparison for cases without a useful bound.

The error of a sum of n products, in any order and with or without fused operations, is at most `sum_error(n)` times the
sum of the magnitudes of the products (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounding(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def sum_error(n: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest error of a sum of n products, relative to the sum of their magnitudes.

    It is twice that of rounding to nearest, because instructions for dot products of bf16 may truncate.
    """
    unit = torch.finfo(dtype).eps
    return n * unit / (1 - n * unit)


def distance(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the exact values."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def rounds_like(found: Tensor, peer: Tensor, exact: Tensor) -> bool:
    """Return whether `found` is about as close to the same computation in float32 as the peer.

    This is for chains of 16-bit operations, whose worst-case bound is useless. A computation that rounds as often as
    the peer, in another order, has an independent error of the same size. The order can change a norm over many numbers
    by much less than a factor of 2. A computation that rounds less often is closer.
    """
    return distance(found, exact) <= 2 * distance(peer, exact)


def log_softmax_error(logits: Tensor, off: float = 0.0) -> Tensor:
    """Return the largest error of the log-softmax in float32 of logits [..., V], one bound per row, [..., 1].

    Errors of the logits of at most `off` change a result by at most twice that. The differences from the largest logit
    are rounded, their exponentials have errors of up to two units, and the sum of these one of `sum_error(V)`. The
    logarithm, at most log V, and the two subtractions are rounded.
    """
    n, unit = logits.shape[-1], torch.finfo(torch.float32).eps
    spread = logits.double().amax(-1, keepdim=True) - logits.double().amin(-1, keepdim=True)
    return 2 * off + sum_error(n + 4) + 2 * unit * (spread + math.log(n))


def kl_error(teacher: Tensor, student: Tensor, off: float = 0.0) -> Tensor:
    """Return the largest error of the KL divergence in float32 of logits [..., V], [...].

    The divergence is the sum of p (log p - log q). An error of log p is a relative error of p.
    """
    log_p, log_q = torch.log_softmax(teacher.double(), -1), torch.log_softmax(student.double(), -1)
    of_p, of_q = log_softmax_error(teacher, off), log_softmax_error(student, off)
    p = log_p.exp()
    products = (of_p + sum_error(log_p.shape[-1] + 4)) * (log_p - log_q).abs() + of_p + of_q
    return (p * products).sum(-1)
