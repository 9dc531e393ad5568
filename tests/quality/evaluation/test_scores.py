"""The scores of a window against transformers' own loss and against sums in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qformat.quality.evaluation.scores import first_non_finite, score_window, stack

N_VOCABULARY = 1000


def random_logits(seed: int, *, n_positions: int = 33, scale: float = 6.0) -> torch.Tensor:
    return torch.randn(n_positions, N_VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def random_ids(n: int = 33) -> torch.Tensor:
    return torch.randint(N_VOCABULARY, (n,), generator=torch.Generator().manual_seed(9))


def test_the_loss_is_that_of_transformers(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.arange(60) % 300
    with torch.no_grad():
        output = model(input_ids=ids[None], labels=ids[None])
    got = score_window(output.logits[0], ids)
    assert got.loss.shape == (59,)
    assert got.loss.mean() == pytest.approx(output.loss.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_nbytes", [1, 4000 * 5, 2**21])
def test_divergence_and_agreement_are_those_of_float64(dtype: torch.dtype, chunk_nbytes: int) -> None:
    reference, logits, ids = random_logits(1).to(dtype), random_logits(2).to(dtype), random_ids()
    got = score_window(logits, ids, reference=reference, chunk_nbytes=chunk_nbytes)
    p = torch.softmax(reference[:-1].double(), -1).numpy()
    log_q = torch.log_softmax(logits[:-1].double(), -1).numpy()
    assert got.kl is not None
    np.testing.assert_allclose(got.kl, (p * (np.log(p) - log_q)).sum(-1), rtol=2e-6)
    np.testing.assert_allclose(got.loss, -log_q[np.arange(32), ids[1:].numpy()], rtol=2e-6)
    assert got.top1.tolist() == logits[:-1].double().argmax(-1).tolist()


def test_small_divergences_keep_their_digits() -> None:
    reference = random_logits(1)
    logits = reference + 1e-2 * random_logits(2, scale=1.0)
    p = torch.softmax(reference[:-1].double(), -1)
    expected = (p * (p.log() - torch.log_softmax(logits[:-1].double(), -1))).sum(-1).numpy()
    got = score_window(logits, random_ids(), reference=reference).kl
    assert got is not None
    assert expected.max() < 1e-3
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = random_logits(3).bfloat16()
    got = score_window(logits, random_ids(), reference=logits.clone())
    assert got.kl is not None
    assert (got.kl == 0).all()


def test_logits_are_left_as_they_are() -> None:
    reference, logits = random_logits(1), random_logits(2)
    score_window(logits, random_ids(), reference=reference)
    assert torch.equal(reference, random_logits(1))
    assert torch.equal(logits, random_logits(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["model", "reference"])
def test_the_first_position_that_is_no_number_is_found(bad: float, side: str) -> None:
    logits, reference = random_logits(1), random_logits(2)
    (logits if side == "model" else reference)[7, 5] = bad
    assert first_non_finite(score_window(logits, random_ids(), reference=reference)) == 7
    assert first_non_finite(score_window(random_logits(1), random_ids(), reference=random_logits(2))) is None


def test_stacked_scores_are_one_row_a_window() -> None:
    one, two = (score_window(random_logits(seed), random_ids()) for seed in (1, 2))
    both = stack([one, two])
    assert both.kl is None
    assert np.array_equal(both.loss, np.stack([one.loss, two.loss]))
    assert both.top1.shape == (2, 32)
