"""Error feedback (GPTQ, arXiv:2210.17323) onto the NF4 grid, second level included.

A layer y = X Wᵀ is rounded column by column. The effect of a column's rounding on y is compensated, as far as possible,
by adjusting the columns still to be rounded: with H = 2 XᵀX and U the upper Cholesky factor of its inverse, the error
(w - q) / U[j, j] of column j is subtracted, times U[j, l], from every later column l. Damping makes H invertible.

A block's scale is chosen when its first column is due, after all feedback from the columns before it: among several
multiples of the block's absmax, the one whose squared error, weighted with 1 / U[j, j]^2, is smallest. Scales that are
double-quantized depend on each other (one offset per tensor, one nested absmax per 256 scales), so there are two
passes: the first chooses the scales, then all of them are encoded, and the second rounds against the decoded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qformat.artifact.components import PackedShape
from qformat.artifact.packed_arrays import PackedArrays, store_scales
from qformat.codec.nf4 import pack
from qformat.quality.calibration import feedback_kernels

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to the diagonal."""

SCALE_FACTORS = tuple(round(0.80 + 0.02 * step, 2) for step in range(14))
"""0.80 to 1.06: smaller factors clip weights, larger ones make the grid coarser without benefit."""

_SMALLEST_SHARE = 64
"""Minimum number of rows per thread."""


@dataclass(frozen=True, slots=True)
class FeedbackSettings:
    """Options for choosing codes and scales.

    Attributes:
        damping: Share of the mean of H's diagonal that is added to the diagonal.
        factors: Candidate scales in ascending order, as multiples of a block's absmax.
    """

    damping: float = DAMPING
    factors: tuple[float, ...] = SCALE_FACTORS


def inverse_factor(hessian: Tensor, *, damping: float) -> Tensor | None:
    """Return the upper factor U [k, k] such that UᵀU is the inverse of the damped Hessian.

    Args:
        hessian: The Hessian, float32 [k, k]. It is overwritten.
        damping: Share of the mean of the diagonal that is added to the diagonal.

    Returns:
        U, or None if the Hessian cannot be used: all inputs were zero, or some were NaN or Inf.
    """
    mean = hessian.diagonal().mean()
    if not (torch.isfinite(mean) and mean > 0):
        return None
    hessian.diagonal().add_(damping * mean)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower, out=hessian)
    factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed else factor.contiguous()


def encode_with_feedback(
    weights: NDArray[np.float32],
    factor: Tensor,
    *,
    layout: PackedShape,
    settings: FeedbackSettings,
    workers: int,
) -> PackedArrays:
    """Encode a weight whose rows consist of full blocks with error feedback.

    Args:
        weights: The weight, float32 [n, k].
        factor: Factor U of the inverse Hessian of the weight's inputs, float32 [k, k].
        layout: Layout of the weight; its shape has n x k elements.
        settings: Options of the error feedback.
        workers: Number of threads for rounding columns. Does not affect the result.
    """
    block_size = layout.block_size
    scales = np.zeros((weights.shape[0], weights.shape[1] // block_size), np.float32)
    with ThreadPoolExecutor(workers, thread_name_prefix="qformat-feedback") as pool:
        in_shares = _RowShares(pool, weights.shape[0], workers)
        codes = _feed_back(weights, factor, scales, block_size, settings.factors, in_shares)
        stored = store_scales(scales.reshape(-1), layout)
        if layout.double_quant:
            scales = stored.scales().reshape(scales.shape)
            codes = _feed_back(weights, factor, scales, block_size, None, in_shares)
    return stored.with_codes(pack(codes.reshape(-1)))


@dataclass(frozen=True, slots=True)
class _RowShares:
    """Calls work(first_row, last_row) for all rows, divided among threads."""

    pool: ThreadPoolExecutor
    n_rows: int
    workers: int

    def __call__(self, work: Callable[[int, int], None]) -> None:
        n_shares = max(1, min(self.workers, self.n_rows // _SMALLEST_SHARE))
        bounds = [self.n_rows * share // n_shares for share in range(n_shares + 1)]
        for done in [self.pool.submit(work, bounds[i], bounds[i + 1]) for i in range(n_shares)]:
            done.result()


def _feed_back(
    weights: NDArray[np.float32],
    factor: Tensor,
    scales: NDArray[np.float32],
    block_size: int,
    factors: tuple[float, ...] | None,
    in_shares: _RowShares,
) -> NDArray[np.uint8]:
    """Return the codes [n, k] of one pass. With `factors`, `scales` [n, k / block_size] are chosen in this pass."""
    # The columns still to be rounded, feedback included. They are in torch's own memory, because the bits of a product
    # may depend on the alignment of its operands.
    moved = torch.from_numpy(weights).clone()
    errors = torch.empty(weights.shape[0], block_size)
    codes = np.empty(weights.shape, np.uint8)
    upper = factor.numpy()
    precisions = (1 / np.square(upper.diagonal())).astype(np.float32)
    tried = None if factors is None else np.array(factors, np.float32)
    for start in range(0, weights.shape[1], block_size):

        def round_rows(first: int, last: int, start: int = start) -> None:
            if tried is not None:
                feedback_kernels.choose_scales(moved.numpy(), first, last, start, block_size, precisions, tried, scales)
            feedback_kernels.round_block(
                moved.numpy(), first, last, start, block_size, upper, scales, codes, errors.numpy()
            )

        in_shares(round_rows)
        rest = start + block_size
        moved[:, rest:].addmm_(errors, factor[start:rest, rest:], alpha=-1)
    return codes
