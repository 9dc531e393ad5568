"""Perplexity of real text: `load_model` compared with transformers + bitsandbytes on the same artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.model.peers.real_text import windows
from tests.model.sides import SAME_PRODUCTS, load_exact, load_ours, load_peer
from tests.rounding import rounds_like


def losses(model: Any, texts: list[Tensor]) -> Tensor:
    """Return the loss of every token except the first of each text."""
    with torch.no_grad():
        logits = [model(ids).logits[0, :-1].float() for ids in texts]
    return torch.cat([cross_entropy(one, ids[0, 1:], reduction="none") for one, ids in zip(logits, texts, strict=True)])


@pytest.mark.parametrize("n_windows", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_perplexity_equals_that_of_bitsandbytes(smollm2_nf4: Path, n_windows: int) -> None:
    """Use 2,000 and 20,000 tokens. Without bf16 products, losses must be as close to fp32 as those of bitsandbytes."""
    texts = windows(smollm2_nf4, count=n_windows, size=500)
    found, expected = losses(load_ours(smollm2_nf4), texts), losses(load_peer(smollm2_nf4), texts)
    if SAME_PRODUCTS:
        assert torch.equal(found, expected)
    else:
        assert rounds_like(found, expected, losses(load_exact(smollm2_nf4), texts))
    assert float(found.mean().exp()) < 30  # the model works: chance would give 49,152
