"""Where in a text a model differs from its 16-bit model: by position, by token, by size, and the worst tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.manifest import JsonObject
from qformat.quality.evaluation.estimates import estimate
from qformat.quality.evaluation.evaluate import TextScores
from qformat.quality.evaluation.scores import Scores
from qformat.quality.windows import TokenWindows
from qformat.strict_json import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KL_BOUNDS = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Bounds between the bars of the histogram, in nats."""

_N_BINS = 32
_N_TOKENS = 15
_MIN_OCCURRENCES = 3
_N_WORST = 12
_CONTEXT_TOKENS = 24


def details(text: TextScores, scores: Scores, tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """Return what the HTML report shows for one model on one text. A 16-bit model is required.

    Args:
        text: Windows and scores of the text.
        scores: Scores of the model.
        tokenizer: Tokenizer of the model.
    """
    assert text.source is not None
    assert scores.kl is not None
    increase = scores.loss - text.source.loss
    return {
        "by_position": _by_position(increase, scores.kl),
        "by_token": _by_token(increase, text.windows, tokenizer),
        "kl_histogram": _histogram(scores.kl),
        "worst": _worst(text, scores, increase, tokenizer),
    }


def _by_position(increase: NDArray[np.float64], kl: NDArray[np.float64]) -> list[Json]:
    """Return means over neighbouring positions, so that a curve has at most _N_BINS points."""
    n_positions = increase.shape[1]
    bounds = np.linspace(0, n_positions, min(_N_BINS, n_positions) + 1).astype(int)
    return [
        {
            "position": int(start + stop + 1) // 2,  # of the predicted tokens, the first of which is token 1
            "loss_increase": estimate(increase[:, start:stop]).to_json(),
            "kl": estimate(kl[:, start:stop]).to_json(),
        }
        for start, stop in pairwise(bounds)
    ]


def _by_token(increase: NDArray[np.float64], windows: TokenWindows, tokenizer: PreTrainedTokenizerBase) -> list[Json]:
    """Return the tokens with the largest total increase in loss, among those that occur at least three times."""
    ids, places, counts = np.unique(windows.ids[:, 1:], return_inverse=True, return_counts=True)
    totals = np.bincount(places.reshape(-1), weights=increase.reshape(-1))
    frequent = np.flatnonzero(counts >= _MIN_OCCURRENCES)
    order = frequent[np.argsort(-np.abs(totals[frequent]), kind="stable")][:_N_TOKENS]
    return [
        {
            "token": _spelled(tokenizer, int(ids[index])),
            "count": int(counts[index]),
            "mean": float(f"{totals[index] / counts[index]:.6g}"),
            "total": float(f"{totals[index]:.6g}"),
        }
        for index in order
    ]


def _histogram(kl: NDArray[np.float64]) -> list[Json]:
    """Return the share of tokens below the first bound, between neighbouring bounds, and above the last one."""
    counts = np.bincount(np.digitize(kl.reshape(-1), KL_BOUNDS), minlength=len(KL_BOUNDS) + 1)
    return [float(f"{count / kl.size:.6g}") for count in counts]


def _worst(
    text: TextScores, scores: Scores, increase: NDArray[np.float64], tokenizer: PreTrainedTokenizerBase
) -> list[Json]:
    assert text.source is not None
    assert scores.kl is not None
    n_positions = scores.kl.shape[1]
    found: list[Json] = []
    for flat in np.argsort(-scores.kl, axis=None, kind="stable")[:_N_WORST].tolist():
        window, position = divmod(flat, n_positions)
        ids = text.windows.ids[window]
        before = ids[max(0, position + 1 - _CONTEXT_TOKENS) : position + 1].tolist()
        found.append(
            {
                "window": int(text.windows.numbers[window]),
                "position": position + 1,
                "context": str(tokenizer.decode(before)),
                "token": _spelled(tokenizer, int(ids[position + 1])),
                "source_top1": _spelled(tokenizer, int(text.source.top1[window, position])),
                "top1": _spelled(tokenizer, int(scores.top1[window, position])),
                "kl": float(f"{scores.kl[window, position]:.6g}"),
                "loss_increase": float(f"{increase[window, position]:.6g}"),
            }
        )
    return found


def _spelled(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))
