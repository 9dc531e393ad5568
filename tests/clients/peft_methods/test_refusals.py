"""Methods that do not work on packed layers are refused in one line, however PEFT attaches them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import VeloraConfig

from qformat.errors import UsageError
from tests.clients.peft_methods.sides import FORWARD, IDS, decoded, difference, packed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

LAYER = "model.layers.0.self_attn.q_proj"


def velora() -> peft.PeftConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj"], velora_config=VeloraConfig())


def add_second(model: Any, config: peft.PeftConfig) -> None:
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).add_adapter("second", config)


WAYS = [
    pytest.param(peft.get_peft_model, id="get_peft_model"),
    pytest.param(lambda model, config: peft.inject_adapter_in_model(config, model), id="inject_adapter_in_model"),
    pytest.param(lambda model, config: model.add_adapter(config), id="add_adapter of transformers"),
    pytest.param(add_second, id="second adapter"),
]


@pytest.mark.parametrize("attach", WAYS)
def test_every_way_to_attach_an_adapter_is_checked(attach: Callable[[Any, Any], Any], tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=rf"LoraConfig \(lora_velora_embed\) .* '{LAYER}': .*qformat export") as raised:
        attach(packed(tiny_llama), velora())
    assert "\n" not in str(raised.value)


def test_an_adapter_works_after_a_second_one_was_refused(tiny_llama: Path) -> None:
    wrapped = peft.get_peft_model(packed(tiny_llama), peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    before = wrapped(input_ids=IDS).logits
    with pytest.raises(UsageError, match="lora_velora_embed"):
        wrapped.add_adapter("second", velora())
    wrapped.set_adapter("default")
    assert torch.equal(wrapped(input_ids=IDS).logits, before)


def test_a_method_that_needs_the_matrix_works_on_layers_that_were_kept(tiny_llama: Path, decoded_llama: Path) -> None:
    logits = []
    for model in (packed(tiny_llama), decoded(decoded_llama)):
        torch.manual_seed(0)
        config = peft.LoHaConfig(r=4, target_modules=["lm_head"], init_weights=False)
        logits.append(peft.get_peft_model(model, config).eval()(input_ids=IDS).logits.detach())
    assert difference(*logits) < FORWARD
