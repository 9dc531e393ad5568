"""Each method of PEFT trains a packed model as it trains the decoded one, or is refused."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from qformat.errors import QformatError
from tests.clients.peft_methods import sides
from tests.clients.peft_methods.methods import NOT_TRIED, REFUSED, WORKING, Method, Refused
from tests.clients.peft_methods.sides import BACKWARD, BF16_NORM, FORWARD, decoded, difference, packed, wrap

pytestmark = [
    # PEFT's own remarks on a configuration.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def label(method: Method) -> str:
    return "-".join([method.name, *sorted(method.config.keywords.keys() - COMMON_OPTIONS)]).replace(" ", "_")


COMMON_OPTIONS = {"task_type", "r", "lora_alpha", "target_modules"}
METHODS = [
    pytest.param(method, id=label(method), marks=[] if method.fast else [pytest.mark.slow]) for method in WORKING
]

REFUSALS = [
    pytest.param(one, id=label(one.method), marks=[] if one.method.needs is None else [pytest.mark.slow])
    for one in REFUSED
]


@pytest.mark.parametrize("method", METHODS)
def test_outputs_gradients_and_saved_adapters_are_those_of_the_decoded_model(
    method: Method, tiny_llama: Path, decoded_llama: Path, tmp_path: Path
) -> None:
    base = sides.evaluate(decoded(decoded_llama), Method("none", method.config))
    ours, theirs = wrap(packed(tiny_llama), method), wrap(decoded(decoded_llama), method)
    if method.encodes:
        sides.copy_start(ours, theirs)
    found, expected = sides.run(ours, method), sides.run(theirs, method)
    forward, backward = (BF16_NORM + FORWARD, 3 * BF16_NORM + BACKWARD) if method.bf16_norms else (FORWARD, BACKWARD)
    assert difference(found.logits, expected.logits) < forward
    assert found.gradients.keys() == expected.gradients.keys() != set()
    for name, gradient in expected.gradients.items():
        assert difference(found.gradients[name], gradient) < backward, name

    evaluated, theirs_evaluated = sides.evaluate(ours, method), sides.evaluate(theirs, method)
    assert difference(evaluated, theirs_evaluated) < forward
    assert difference(theirs_evaluated, base) > 5 * forward, "the adapter moves the logits by more than is allowed"
    ours.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(packed(tiny_llama), tmp_path)
    assert torch.equal(sides.evaluate(reloaded, method), evaluated)
    if method.encodes:
        return  # the decoded model starts from weights that are not rounded again
    on_decoded = PeftModel.from_pretrained(decoded(decoded_llama), tmp_path)
    assert difference(sides.evaluate(on_decoded, method), theirs_evaluated) < forward


@pytest.mark.parametrize("refused", REFUSALS)
def test_a_method_that_computes_with_the_weight_is_refused_when_peft_wraps(refused: Refused, tiny_llama: Path) -> None:
    if refused.method.needs is not None:
        pytest.importorskip(refused.method.needs, reason="the extra 'clients' is not installed: make test-slow")
    with pytest.raises((TypeError, ValueError, RuntimeError, QformatError), match=refused.message):
        peft.get_peft_model(packed(tiny_llama), refused.method.config())


def test_every_type_of_peft_is_in_a_table() -> None:
    listed = [*WORKING, *(refused.method for refused in REFUSED)]
    classes = {method.config.func for method in listed}
    assert {kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config not in classes} == set(
        NOT_TRIED
    )
