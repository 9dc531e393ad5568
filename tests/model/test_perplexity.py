"""Perplexity of real text: `load_model` against transformers + bitsandbytes on the same artifact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.real_text import windows
from tests.model.sides import SAME_PRODUCTS, load_ours, load_peer


def perplexity(model: Any, texts: list[Tensor]) -> float:
    with torch.no_grad():
        losses = [float(model(ids, labels=ids).loss) for ids in texts]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("n_windows", "tolerance"), [(4, 2e-3), pytest.param(40, 1e-3, marks=pytest.mark.slow)])
def test_perplexity_is_that_of_bitsandbytes(smollm2_nf4: Path, n_windows: int, tolerance: float) -> None:
    """2,000 and 20,000 tokens. On AVX512-BF16 the peer's own inference, with scales in bf16, is 0.2% and 0.05% away.

    The tolerance is for CPUs without instructions for products of bf16: restricted to AVX2, 2,000 tokens differ by
    0.10%, 12,000 by 0.03%.
    """
    texts = windows(smollm2_nf4, count=n_windows, size=500)
    found = perplexity(load_ours(smollm2_nf4), texts)
    expected = perplexity(load_peer(smollm2_nf4), texts)
    assert found == (expected if SAME_PRODUCTS else pytest.approx(expected, rel=tolerance))
    assert found < 30  # the model is at work: 49,152 would be chance
