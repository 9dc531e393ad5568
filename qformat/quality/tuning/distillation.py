"""The loss of tuning: KL from the 16-bit model's distribution to the artifact's, over all positions.

    KL = sum over tokens v of p[v] * (log p[v] - log q[v]),    d KL / d logit[v] = q[v] - p[v]

p is the 16-bit model's, q the artifact's, both in float32. Losses and their gradients are taken for a chunk of
positions at a time, so that no float32 logits of a whole batch exist.
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
    """Of P positions: kl [P], nats; agrees [P], the same most likely token; gradient [P, V] of the kl by logits."""

    kl: Tensor
    agrees: Tensor
    gradient: Tensor | None


class Target(Protocol):
    """What the 16-bit model says about the tokens of a batch, position by position."""

    def compare(self, log_q: Tensor, positions: slice, *, gradient: bool) -> Comparison:
        """Compare log-probabilities [P, V], float32, of a range of positions of the batch. May overwrite them."""

    def finite(self) -> bool:
        """Whether the 16-bit model gave finite numbers only."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""


@dataclass(frozen=True, slots=True)
class DenseTarget:
    """All of p, by the model's hidden states [N, H] and its head."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def compare(self, log_q: Tensor, positions: slice, *, gradient: bool) -> Comparison:
        """Compare with the whole distribution."""
        log_p = torch.log_softmax(self.head(self.hidden[positions]), -1, dtype=torch.float32)
        agrees = log_p.argmax(-1) == log_q.argmax(-1)
        p = log_p.exp()
        kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
        return Comparison(kl, agrees, log_q.exp_().sub_(p) if gradient else None)

    def finite(self) -> bool:
        """Whether all hidden states are, and the logits of one position, where the head's weights show."""
        return bool(torch.isfinite(self.hidden).all() and torch.isfinite(self.head(self.hidden[-1:])).all())

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.hidden.nbytes


@dataclass(frozen=True, slots=True)
class TopKTarget:
    """The k largest of p: log_p [N, k], descending, and tokens [N, k], int64. All other tokens count as one.

    The KL of the distributions over k + 1 outcomes is at most that over all tokens.
    """

    log_p: Tensor
    tokens: Tensor

    def compare(self, log_q: Tensor, positions: slice, *, gradient: bool) -> Comparison:
        """Compare with the k largest and the rest as one."""
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
        """Whether all log-probabilities are."""
        return bool(torch.isfinite(self.log_p).all())

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.log_p.nbytes + self.tokens.nbytes


def distil(student: SplitModel, ids: Tensor, target: Target) -> float:
    """Add the gradient of the mean KL over all positions of ids [B, L] to the student's parameters; return the KL."""
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
    """How close a model is to the 16-bit one on text: means over positions of each window, float64 [n_windows].

    kl: nats a token. top1: share of positions with the same most likely token. loss: of the next token, nats.
    """

    kl: Tensor
    top1: Tensor
    loss: Tensor

    @classmethod
    def join(cls, parts: list[Closeness]) -> Closeness:
        """Return the windows of several one after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "top1", "loss")))

    def mean(self, name: str) -> float:
        """Return the mean of a figure over windows."""
        return float(getattr(self, name).mean())

    def error(self, name: str) -> float:
        """Return the standard error of that mean; NaN for one window."""
        values: Tensor = getattr(self, name)
        return float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def measure(student: SplitModel, ids: Tensor, target: Target) -> Closeness:
    """Return how close a model is on windows ids [B, L]."""
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
