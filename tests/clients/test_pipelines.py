"""transformers' pipelines and its own adapters, and PEFT's AutoPeftModel: the decoded model's texts and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.clients.peft_methods.sides import decoded, packed

pytestmark = pytest.mark.usefixtures("registered")

PROMPTS = ["the block holds", "every code counts", "pages move while"]
CONFIG = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def by_from_pretrained(artifact: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)


def texts(model: Any, artifact: Path) -> list[str]:
    generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(artifact), device="cpu")
    found = generate(PROMPTS, max_new_tokens=12, do_sample=False, return_full_text=False)
    return [one[0]["generated_text"] for one in found]


@pytest.fixture(scope="module")
def adapter(speaking_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter that moves the logits. It names the artifact as its base."""
    torch.manual_seed(0)
    wrapped = get_peft_model(packed(speaking_llama), CONFIG)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    wrapped.peft_config["default"].base_model_name_or_path = str(speaking_llama)
    out = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(out)
    return out


@pytest.fixture
def expected(adapter: Path, decoded_speaking_llama: Path, speaking_llama: Path) -> list[str]:
    """Texts of the decoded model with the adapter."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(decoded(decoded_speaking_llama), adapter)
    return texts(model, speaking_llama)


def test_a_pipeline_writes_the_texts_of_the_decoded_model(speaking_llama: Path, decoded_speaking_llama: Path) -> None:
    expected = texts(decoded(decoded_speaking_llama), speaking_llama)
    assert texts(packed(speaking_llama), speaking_llama) == expected
    assert texts(by_from_pretrained(speaking_llama), speaking_llama) == expected


def test_a_pipeline_of_a_path_uses_the_packed_weights(speaking_llama: Path, decoded_speaking_llama: Path) -> None:
    generate = pipeline("text-generation", model=str(speaking_llama), dtype=torch.float32, device="cpu")
    assert type(generate.model.model.layers[0].mlp.up_proj).__name__ == "NF4Linear"
    assert texts(generate.model, speaking_llama) == texts(decoded(decoded_speaking_llama), speaking_llama)


def test_an_adapter_alone_loads_with_its_base(adapter: Path, speaking_llama: Path, expected: list[str]) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    assert texts(model, speaking_llama) == expected


@pytest.mark.parametrize("load", [packed, by_from_pretrained])
def test_transformers_own_adapters_act_as_those_of_peft(
    load: Any, adapter: Path, speaking_llama: Path, expected: list[str]
) -> None:
    model = load(speaking_llama)
    plain = texts(model, speaking_llama)
    model.load_adapter(str(adapter))
    assert texts(model, speaking_llama) == expected != plain
    model.disable_adapters()
    assert texts(model, speaking_llama) == plain


def test_an_added_adapter_is_trained_and_saved_alone(speaking_llama: Path, tmp_path: Path) -> None:
    model = packed(speaking_llama)
    model.add_adapter(CONFIG)
    ids = torch.arange(3, 15)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()
