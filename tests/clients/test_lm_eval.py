"""lm-eval's figures of a packed model are those of the decoded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.clients.peft_methods.sides import FORWARD, decoded, packed
from tests.rounding import log_softmax_error

pytest.importorskip("lm_eval", reason="the extra 'clients' is not installed: make test-slow")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CHOICES = [("the block holds", " one scale"), ("the block holds", " every page"), ("pages move", " while code counts")]
PROMPTS = ["the block holds", "every code counts"]


def harness(model: Any, artifact: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(model, tokenizer=AutoTokenizer.from_pretrained(artifact), batch_size=2, max_length=64, device="cpu")


def requests(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def likelihood_error(model: Any, artifact: Path, text: str) -> float:
    """Return the largest difference of the log likelihood of a text, whose tokens have one error each."""
    ids = AutoTokenizer.from_pretrained(artifact)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0]
    return float(log_softmax_error(logits, FORWARD * float(logits.abs().max())).sum())


def test_choices_and_texts_are_scored_as_with_the_decoded_model(
    speaking_llama: Path, decoded_speaking_llama: Path
) -> None:
    exact = decoded(decoded_speaking_llama)
    errors = [likelihood_error(exact, speaking_llama, prompt + choice) for prompt, choice in CHOICES]
    ours, theirs = harness(packed(speaking_llama), speaking_llama), harness(exact, speaking_llama)
    found, expected = (side.loglikelihood(requests("loglikelihood", CHOICES)) for side in (ours, theirs))
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    for (ours_is, _), (theirs_is, _), error in zip(found, expected, errors, strict=True):
        assert abs(ours_is - theirs_is) < error < 0.05 * abs(theirs_is)
    whole = [(prompt + choice,) for prompt, choice in CHOICES]
    rolling = (side.loglikelihood_rolling(requests("loglikelihood_rolling", whole)) for side in (ours, theirs))
    for ours_is, theirs_is, error in zip(*rolling, errors, strict=True):
        assert abs(ours_is - theirs_is) < error


def test_generated_texts_are_those_of_the_decoded_model(speaking_llama: Path, decoded_speaking_llama: Path) -> None:
    greedy = [(text, {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}) for text in PROMPTS]
    found, expected = (
        harness(model, speaking_llama).generate_until(requests("generate_until", greedy))
        for model in (packed(speaking_llama), decoded(decoded_speaking_llama))
    )
    assert found == expected
    assert all(found)
