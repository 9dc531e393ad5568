"""Scores of each token of a window from its logits: loss, divergence from the 16-bit model, most likely token.

    loss[t] = -log q(token t + 1 | tokens 0 ... t)
    kl[t]   = sum over tokens v of p(v) (log p(v) - log q(v)),   p: the 16-bit model, q: the other one

All positions except the last are scored, since the token after the window is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CPU_CHUNK_NBYTES = 2**21
"""Largest size in bytes of the float32 logits to process at a time on a CPU, so that they stay in the cache (2**19 and
2**23 are slower).
"""

DEVICE_CHUNK_NBYTES = 2**27
"""The same for other devices, where memory is fast and starting kernels takes time. Not measured on a GPU yet."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one window of L tokens, each [L - 1], or of several windows, each [n_windows, L - 1].

    Attributes:
        loss: Loss in nats, float64.
        top1: The most likely token, int64.
        kl: KL divergence from the 16-bit model in nats, float64. None without a 16-bit model.
    """

    loss: NDArray[np.float64]
    top1: NDArray[np.int64]
    kl: NDArray[np.float64] | None


def score_window(
    logits: Tensor, ids: Tensor, *, reference: Tensor | None = None, chunk_nbytes: int | None = None
) -> Scores:
    """Score a window. All arithmetic is in float32.

    Args:
        logits: Logits of the model, [L, vocabulary], any float dtype.
        ids: Token ids of the window, int64 [L].
        reference: Logits of the 16-bit model, like `logits`.
        chunk_nbytes: Size in bytes of the float32 logits to process at a time. The default depends on the device.
    """
    n_positions, n_vocabulary = ids.numel() - 1, logits.shape[-1]
    if chunk_nbytes is None:
        chunk_nbytes = CPU_CHUNK_NBYTES if logits.device.type == "cpu" else DEVICE_CHUNK_NBYTES
    step = max(1, chunk_nbytes // (4 * n_vocabulary))
    loss, top1, kl = [], [], []
    for start in range(0, n_positions, step):
        stop = min(start + step, n_positions)
        chunk = logits[start:stop].float()
        log_q = torch.log_softmax(chunk, -1)  # [step, vocabulary]
        loss.append(-log_q.gather(-1, ids[start + 1 : stop + 1, None])[:, 0])
        top1.append(_largest(chunk))
        if reference is not None:
            of_reference = reference[start:stop].float()
            log_p = torch.log_softmax(of_reference, -1)
            kl.append(torch.linalg.vecdot(torch.softmax(of_reference, -1), log_p.sub_(log_q)))
    return Scores(
        torch.cat(loss).double().cpu().numpy(),
        torch.cat(top1).cpu().numpy(),
        torch.cat(kl).double().cpu().numpy() if kl else None,
    )


def _largest(logits: Tensor) -> Tensor:
    """Return the index of the first maximum of each row. On a CPU, numpy takes a tenth of torch's time."""
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def stack(scores: list[Scores]) -> Scores:
    """Combine the scores of several windows of one length."""
    kl = [score.kl for score in scores if score.kl is not None]
    return Scores(
        np.stack([score.loss for score in scores]),
        np.stack([score.top1 for score in scores]),
        np.stack(kl) if kl else None,
    )


def first_non_finite(scores: Scores) -> int | None:
    """Return the first position of a window whose loss or divergence shows that its logits are NaN or Inf."""
    bad = ~np.isfinite(scores.loss)
    if scores.kl is not None:
        bad |= ~np.isfinite(scores.kl)
    return int(np.flatnonzero(bad)[0]) if bad.any() else None
