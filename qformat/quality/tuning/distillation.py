"""The loss of tuning: KL from the 16-bit model's distribution to the artifact's, over all positions.

    KL = sum over tokens v of p[v] * (log p[v] - log q[v]),    d KL / d logit[v] = q[v] - p[v]

p is the 16-bit model's distribution and q the artifact's, both in float32. Losses and their gradients are computed for
one chunk of positions at a time, so that the float32 logits of a whole batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qformat.quality.output_head import SplitModel

IGNORED = -1


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of P positions.

    Attributes:
        kl: KL divergence in nats, [P].
        agrees: Whether both models have the same most likely token, [P].
        gradient: Gradient of the KL with respect to the logits, [P, V], or None if it was not requested.
    """

    kl: Tensor
    agrees: Tensor
    gradient: Tensor | None


class Target(Protocol):
    """Predictions of the 16-bit model for each position of a batch."""

    def compare(self, log_q: Tensor, positions: slice, *, gradient: bool) -> Comparison:
        """Compare log-probabilities with the predictions.

        Args:
            log_q: Log-probabilities of the artifact, float32 [P, V]. May be overwritten.
            positions: Range of positions of the batch.
            gradient: Whether to compute the gradient.
        """

    def finite(self) -> bool:
        """Return whether the predictions contain neither NaN nor Inf."""

    @property
    def nbytes(self) -> int:
        """Memory in bytes that the predictions take."""


@dataclass(frozen=True, slots=True)
class DenseTarget:
    """The whole distribution p, represented by the 16-bit model's hidden states and head.

    Attributes:
        hidden: Hidden states, [N, H].
        head: Maps hidden states [P, H] to logits [P, V].
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def compare(self, log_q: Tensor, positions: slice, *, gradient: bool) -> Comparison:
        """Compare log-probabilities with the whole distribution.

        Args:
            log_q: Log-probabilities of the artifact, float32 [P, V]. Overwritten.
            positions: Range of positions of the batch.
            gradient: Whether to compute the gradient.
        """
        log_p = torch.log_softmax(self.head(self.hidden[positions]), -1, dtype=torch.float32)
        agrees = log_p.argmax(-1) == log_q.argmax(-1)
        p = log_p.exp()
        kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
        return Comparison(kl, agrees, log_q.exp_().sub_(p) if gradient else None)

    def finite(self) -> bool:
        """Return whether all hidden states are finite, and the logits of one position, to check the head too."""
        return bool(torch.isfinite(self.hidden).all() and torch.isfinite(self.head(self.hidden[-1:])).all())

    @property
    def nbytes(self) -> int:
        """Memory in bytes that the hidden states take."""
        return self.hidden.nbytes


@dataclass(frozen=True, slots=True)
class TopKTarget:
    """The k largest probabilities of p. All other tokens count as a single outcome.

    The KL of these distributions over k + 1 outcomes is at most the KL over all tokens.

    Attributes:
        log_p: Log-probabilities, descending, float32 [N, k].
        tokens: Their token ids, int64 [N, k].
    """

    log_p: Tensor
    tokens: Tensor

    def compare(self, log_q: Tensor, positions: slice, *, gradient: bool) -> Comparison:
        """Compare log-probabilities with the k largest ones and the combined rest.

        Args:
            log_q: Log-probabilities of the artifact, float32 [P, V]. Overwritten.
            positions: Range of positions of the batch.
            gradient: Whether to compute the gradient.
        """
        log_p, tokens = self.log_p[positions], self.tokens[positions]
        mine = log_q.gather(-1, tokens)
        p, q = log_p.exp(), mine.exp()
        rest_p = (1 - p.sum(-1)).clamp_min(1e-9)
        rest_q = (1 - q.sum(-1)).clamp_min(1e-9)
        kl = torch.linalg.vecdot(p, log_p - mine) + rest_p * (rest_p.log() - rest_q.log())
        agrees = tokens[:, 0] == log_q.argmax(-1)
        if not gradient:
            return Comparison(kl, agrees, None)
        slope = log_q.exp_().mul_((1 - rest_p / rest_q)[:, None])
        return Comparison(kl, agrees, slope.scatter_(-1, tokens, q - p))

    def finite(self) -> bool:
        """Return whether all log-probabilities are finite."""
        return bool(torch.isfinite(self.log_p).all())

    @property
    def nbytes(self) -> int:
        """Memory in bytes that the log-probabilities and tokens take."""
        return self.log_p.nbytes + self.tokens.nbytes


def distil(student: SplitModel, ids: Tensor, target: Target) -> float:
    """Add the gradient of the mean KL over all positions to the student's parameters.

    Args:
        student: The model to tune.
        ids: Token ids, int64 [B, L].
        target: Predictions of the 16-bit model for this batch.

    Returns:
        The mean KL in nats per token.
    """
    hidden = student.body(ids)
    flat = hidden.detach().flatten(0, 1)  # [N, H]
    slopes = torch.empty_like(flat)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for positions in student.chunks(len(flat)):
        part = flat[positions].requires_grad_()
        with torch.enable_grad():
            logits = student.head(part)
        log_q = torch.log_softmax(logits.detach(), -1, dtype=torch.float32)
        compared = target.compare(log_q, positions, gradient=True)
        assert compared.gradient is not None
        (slopes[positions],) = torch.autograd.grad(logits, part, compared.gradient.div_(len(flat)).to(logits.dtype))
        total += compared.kl.double().sum()
    hidden.backward(slopes.view_as(hidden))  # type: ignore[no-untyped-call]
    return float(total) / len(flat)


@dataclass(frozen=True, slots=True)
class Closeness:
    """How close a model is to the 16-bit model on a text: means over the positions of each window, float64 [n_windows].

    Attributes:
        kl: KL divergence in nats per token.
        top1: Share of positions with the same most likely token.
        loss: Loss of the next token in nats.
    """

    kl: Tensor
    top1: Tensor
    loss: Tensor

    @classmethod
    def join(cls, parts: list[Closeness]) -> Closeness:
        """Concatenate the windows of several parts."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "top1", "loss")))

    def mean(self, name: str) -> float:
        """Return the mean of a figure over windows."""
        return float(getattr(self, name).mean())

    def error(self, name: str) -> float:
        """Return the standard error of that mean, or NaN for a single window."""
        values: Tensor = getattr(self, name)
        return float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def measure(student: SplitModel, ids: Tensor, target: Target) -> Closeness:
    """Measure how close a model is to the 16-bit model on windows.

    Args:
        student: The model to measure.
        ids: Token ids, int64 [B, L].
        target: Predictions of the 16-bit model for these windows.
    """
    flat = student.body(ids).flatten(0, 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    labels = labels.flatten()
    kl, agrees, loss = (torch.empty(len(flat), dtype=torch.float64, device=flat.device) for _ in range(3))
    for positions in student.chunks(len(flat)):
        log_q = torch.log_softmax(student.head(flat[positions]), -1, dtype=torch.float32)
        loss[positions] = -log_q.gather(-1, labels[positions].clamp_min(0)[:, None])[:, 0].double()
        compared = target.compare(log_q, positions, gradient=False)
        kl[positions], agrees[positions] = compared.kl.double(), compared.agrees.double()

    def of_windows(values: Tensor, n: int) -> Tensor:
        return values.view(ids.shape)[:, :n].mean(1).cpu()

    length = ids.shape[1]
    return Closeness(of_windows(kl, length), of_windows(agrees, length), of_windows(loss, length - 1))
