"""The scores of a window compared with transformers' own loss and with sums in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qformat.quality.evaluation.scores import first_non_finite, score_window, stack
from tests.rounding import kl_error, log_softmax_error, rounds_like, sum_error

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
    # Both take the logarithms of the same logits in float32, and transformers the mean as well.
    off = log_softmax_error(output.logits[0, :-1]).mean()
    assert abs(got.loss.mean() - output.loss.item()) <= 2 * off + sum_error(59) * output.loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_nbytes", [1, 4000 * 5, 2**21])
def test_divergence_and_agreement_are_those_of_float64(dtype: torch.dtype, chunk_nbytes: int) -> None:
    reference, logits, ids = random_logits(1).to(dtype), random_logits(2).to(dtype), random_ids()
    got = score_window(logits, ids, reference=reference, chunk_nbytes=chunk_nbytes)
    p = torch.softmax(reference[:-1].double(), -1).numpy()
    log_q = torch.log_softmax(logits[:-1].double(), -1).numpy()
    kl = (p * (np.log(p) - log_q)).sum(-1)
    assert got.kl is not None
    off_kl, off = kl_error(reference[:-1], logits[:-1]).numpy(), log_softmax_error(logits[:-1])[:, 0].numpy()
    assert (np.abs(got.kl - kl) <= off_kl).all()
    assert (np.abs(got.loss + log_q[np.arange(32), ids[1:].numpy()]) <= off).all()
    assert got.top1.tolist() == logits[:-1].double().argmax(-1).tolist()


def test_small_divergences_keep_their_digits() -> None:
    """In the worst case, the errors of the logarithms exceed such a KL: torch's own function is the reference."""
    reference, ids = random_logits(1, n_positions=513), random_ids(513)
    logits = reference + 1e-2 * random_logits(2, n_positions=513, scale=1.0)
    (log_p, log_q), (exact_p, exact_q) = (
        [torch.log_softmax(side[:-1].to(dtype), -1) for side in (reference, logits)]
        for dtype in (torch.float32, torch.float64)
    )
    peer, exact = (
        torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        for p, q in ((log_p, log_q), (exact_p, exact_q))
    )
    got = score_window(logits, ids, reference=reference).kl
    assert got is not None
    assert exact.max() < 1e-3
    assert rounds_like(torch.from_numpy(got), peer, exact)


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
def test_the_first_non_finite_position_is_found(bad: float, side: str) -> None:
    logits, reference = random_logits(1), random_logits(2)
    (logits if side == "model" else reference)[7, 5] = bad
    assert first_non_finite(score_window(logits, random_ids(), reference=reference)) == 7
    assert first_non_finite(score_window(random_logits(1), random_ids(), reference=random_logits(2))) is None


def test_stacked_scores_have_one_row_per_window() -> None:
    one, two = (score_window(random_logits(seed), random_ids()) for seed in (1, 2))
    both = stack([one, two])
    assert both.kl is None
    assert np.array_equal(both.loss, np.stack([one.loss, two.loss]))
    assert both.top1.shape == (2, 32)
