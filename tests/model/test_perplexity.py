"""Perplexity of real text: `load_model` against transformers + bitsandbytes on the same artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.model.real_text import windows
from tests.model.sides import SAME_PRODUCTS, load_exact, load_ours, load_peer
from tests.rounding import rounds_like


def losses(model: Any, texts: list[Tensor]) -> Tensor:
    """Return the loss of every token but each text's first."""
    with torch.no_grad():
        logits = [model(ids).logits[0, :-1].float() for ids in texts]
    return torch.cat([cross_entropy(one, ids[0, 1:], reduction="none") for one, ids in zip(logits, texts, strict=True)])


@pytest.mark.parametrize("n_windows", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_perplexity_is_that_of_bitsandbytes(smollm2_nf4: Path, n_windows: int) -> None:
    """2,000 and 20,000 tokens; where the CPU multiplies no bf16, every loss is as near to the one in fp32 as theirs."""
    texts = windows(smollm2_nf4, count=n_windows, size=500)
    found, expected = losses(load_ours(smollm2_nf4), texts), losses(load_peer(smollm2_nf4), texts)
    if SAME_PRODUCTS:
        assert torch.equal(found, expected)
    else:
        assert rounds_like(found, expected, losses(load_exact(smollm2_nf4), texts))
    assert float(found.mean().exp()) < 30  # the model is at work: 49,152 would be chance
