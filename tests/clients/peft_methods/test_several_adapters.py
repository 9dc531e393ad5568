"""Several adapters on one packed model: chosen, mixed, combined, swapped and removed as on the decoded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from tests.clients.peft_methods.sides import FORWARD, IDS, decoded, difference, packed

ATTENTION = ["q_proj", "v_proj"]
COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune")


def with_two_adapters(model: Any) -> Any:
    """Wrap a model with two adapters of random weights, the same for every model."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config, adapter_name="first")
    wrapped.add_adapter("second", config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(wrapped.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return wrapped.eval()


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **options).logits
    return found


def both(artifact: Path, checkpoint: Path) -> tuple[Any, Any]:
    return with_two_adapters(packed(artifact)), with_two_adapters(decoded(checkpoint))


def choose_second(model: Any) -> None:
    model.set_adapter("second")


def activate_both(model: Any) -> None:
    model.base_model.set_adapter(["first", "second"])


def delete_first(model: Any) -> None:
    model.set_adapter("second")
    model.delete_adapter("first")


def keep_first(model: Any) -> None:
    model.set_adapter("first")


def combine(kind: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        torch.manual_seed(0)  # dare_linear draws which weights it keeps
        density = {"density": 0.5} if kind in {"ties", "dare_linear", "magnitude_prune"} else {}
        model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type=kind, **density)
        model.set_adapter("both")

    return change


CHANGES = [
    pytest.param(keep_first, id="first"),
    pytest.param(choose_second, id="set_adapter"),
    pytest.param(activate_both, id="two_at_once"),
    pytest.param(delete_first, id="delete_adapter"),
    *(pytest.param(combine(kind), id=kind, marks=pytest.mark.slow) for kind in COMBINATIONS),
]


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_act_as_on_the_decoded_model(
    change: Callable[[Any], None], tiny_llama: Path, decoded_llama: Path
) -> None:
    ours, theirs = both(tiny_llama, decoded_llama)
    change(ours)
    change(theirs)
    assert difference(logits(ours), logits(theirs)) < FORWARD


def test_a_disabled_adapter_leaves_the_base_model(tiny_llama: Path) -> None:
    wrapped = with_two_adapters(packed(tiny_llama))
    base = logits(packed(tiny_llama).eval())
    assert difference(logits(wrapped), base) > 10 * FORWARD
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), base)


@pytest.mark.parametrize("gradients", [False, True])
def test_each_row_of_a_batch_may_have_its_own_adapter(gradients: bool, tiny_llama: Path, decoded_llama: Path) -> None:
    ours, theirs = both(tiny_llama, decoded_llama)
    with torch.set_grad_enabled(gradients):
        found, expected = (m(input_ids=IDS, adapter_names=["second", "first"]).logits for m in (ours, theirs))
    assert found.requires_grad == gradients
    assert difference(found.detach(), expected.detach()) < FORWARD
    theirs.set_adapter("second")
    assert difference(found[:1].detach(), logits(theirs)[:1]) < FORWARD


def test_an_adapter_is_swapped_in_place(tiny_llama: Path, tmp_path: Path) -> None:
    saved = with_two_adapters(packed(tiny_llama))
    saved.save_pretrained(tmp_path, selected_adapters=["second"])
    saved.set_adapter("second")
    model = with_two_adapters(packed(tiny_llama))
    model.set_adapter("first")
    hotswap_adapter(model, str(tmp_path / "second"), adapter_name="first", torch_device="cpu")
    assert torch.equal(logits(model), logits(saved))
