"""Merging adapters through PEFT: refused before any layer changes if a packed layer is adapted, as usual otherwise."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qformat import load_model
from qformat.converters.convert import convert
from qformat.errors import UsageError
from qformat.model.nf4_linear import NF4Linear
from tests.small_models import contents, llama_config, llama_tensors, write_checkpoint

IDS = torch.arange(3, 15)[None]

REFUSAL = r"^an adapter cannot be merged into 4-bit weights\. Export .*qformat export ART OUT --to bf16.*merge it"

MERGES: dict[str, Callable[[Any], Any]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload, safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_and_unload of the tuner": lambda model: model.base_model.merge_and_unload(),
    "merge_and_unload of one adapter": lambda model: model.merge_and_unload(adapter_names=["default"]),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge of the layer": lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.merge(),
}

METHODS = {
    "LoRA": peft.LoraConfig(target_modules=["embed_tokens", "q_proj", "lm_head"], r=4),
    "LoRA with a trained embedding": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "LoRA with trained tokens": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "DoRA": peft.LoraConfig(target_modules=["q_proj", "lm_head"], use_dora=True),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj", "lm_head"], total_step=10),
    "IA3": peft.IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[]),
    "OFT": peft.OFTConfig(target_modules=["q_proj", "lm_head"], oft_block_size=8, use_cayley_neumann=False),
    "BOFT": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=8),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"], r=4),
    "RandLoRA": peft.RandLoraConfig(target_modules=["q_proj"], r=4),
    "FourierFT": peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=10),
    "VBLoRA": peft.VBLoRAConfig(target_modules=["q_proj"], num_vectors=8, vector_length=16, topk=2),
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merging")
    source = write_checkpoint(folder / "source", llama_tensors(), config=llama_config())
    convert(source, folder / "nf4")
    return folder / "nf4"


def adapted(artifact: Path, config: peft.PeftConfig) -> Any:
    """Return the model with random adapters, so that a merge of any layer would change the output."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(artifact, device="cpu", dtype=torch.float32), copy.deepcopy(config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS).logits
    return result


def module_names(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, type(module).__name__) for name, module in model.named_modules()]


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return contents(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", MERGES)
def test_merging_is_refused_before_anything_changes(artifact: Path, tmp_path: Path, way: str) -> None:
    model = adapted(artifact, METHODS["LoRA"])
    before, names, adapter = logits(model), module_names(model), saved(model, tmp_path / "before")
    with pytest.raises(UsageError, match=REFUSAL):
        MERGES[way](model)
    assert module_names(model) == names
    assert torch.equal(logits(model), before)
    assert saved(model, tmp_path / "after") == adapter


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_peft_is_refused(artifact: Path, method: str) -> None:
    model = adapted(artifact, METHODS[method])
    before, names = logits(model), module_names(model)
    # PEFT itself refuses to merge IA3 into a model that says that it was loaded in 4 bit.
    error = (UsageError, ValueError) if method == "IA3" else UsageError
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(error, match="4-bit"):
            merge()
        error = UsageError
    assert module_names(model) == names
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["LoRA", "LoRA with trained tokens", "OFT", "VeRA"])
def test_adapters_can_be_removed(artifact: Path, method: str) -> None:
    plain = logits(load_model(artifact, device="cpu", dtype=torch.float32))
    model = adapted(artifact, METHODS[method])
    assert not torch.equal(logits(model), plain)
    unloaded = model.unload()
    assert not [module for module in unloaded.modules() if isinstance(module, BaseTunerLayer)]
    assert torch.equal(logits(unloaded), plain)


def test_unloading_returns_a_trained_module(artifact: Path) -> None:
    model = adapted(artifact, METHODS["LoRA with a trained embedding"])
    trained = model.base_model.model.model.embed_tokens.modules_to_save["default"]
    assert model.unload().model.embed_tokens is trained


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_in_16_bit_merge_as_usual(artifact: Path) -> None:
    config = peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], r=4)
    model = adapted(artifact, config)
    oracle = copy.deepcopy(model)
    for layer in oracle.modules():
        if isinstance(layer, BaseTunerLayer):
            type(layer).merge(layer)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), logits(oracle))
    assert not [module for module in merged.modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_in_16_bit_merge_again_once_the_adapter_of_packed_layers_is_deleted(artifact: Path) -> None:
    model = adapted(artifact, peft.LoraConfig(target_modules=["lm_head"], r=4))
    model.add_adapter("packed", peft.LoraConfig(target_modules=["q_proj"], r=4))
    with pytest.raises(UsageError, match=REFUSAL):
        model.merge_adapter()
    model.delete_adapter("packed")
    model.merge_adapter()
    assert model.base_model.model.lm_head.merged


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("order", [["q_proj", "embed_tokens"], ["embed_tokens", "q_proj"]])
def test_layers_that_a_second_adapter_adds_are_refused_as_well(artifact: Path, order: list[str]) -> None:
    model = adapted(artifact, peft.LoraConfig(target_modules=[order[0]], r=4))
    model.add_adapter("second", peft.LoraConfig(target_modules=[order[1]], r=4))
    model.base_model.set_adapter(["default", "second"])
    names = module_names(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UsageError, match=REFUSAL):
            merge()
    assert module_names(model) == names
    assert not [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and layer.merged]


def test_weighted_adapters_are_covered(artifact: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], r=4)
    model = adapted(artifact, config)
    model.add_adapter("second", config)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    with pytest.raises(UsageError, match=REFUSAL):
        model.merge_and_unload()


def test_mixed_models_of_peft_are_refused_as_for_bitsandbytes(artifact: Path) -> None:
    with pytest.raises(ValueError, match="4bit quantization not supported"):
        get_peft_model(load_model(artifact, device="cpu"), METHODS["LoRA"], mixed=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_saved_adapter_is_refused_after_loading_copying_and_pickling(artifact: Path, tmp_path: Path) -> None:
    adapted(artifact, METHODS["LoRA with a trained embedding"]).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_model(artifact, device="cpu", dtype=torch.float32), tmp_path / "adapter")
    before = logits(loaded.eval())
    for model in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        with pytest.raises(UsageError, match=REFUSAL):
            model.merge_and_unload()
        assert torch.equal(logits(model), before)


def test_no_class_of_peft_is_changed_and_other_models_merge(artifact: Path) -> None:
    with pytest.raises(UsageError, match=REFUSAL):
        adapted(artifact, METHODS["LoRA"]).merge_and_unload()
    assert NF4Linear.__mro__[1] is nn.Linear
    other = get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], r=2))
    assert type(other.merge_and_unload()[0]) is nn.Linear


def test_the_way_that_the_refusal_names_gives_the_models_numbers(artifact: Path, tmp_path: Path) -> None:
    """In fp32, so that merging rounds the weights of one linear layer once: see the bound."""
    from transformers import AutoModelForCausalLM

    from qformat.converters.export import export

    model = adapted(artifact, peft.LoraConfig(target_modules=["q_proj"], r=4))
    model.save_pretrained(tmp_path / "adapter")
    export(artifact, tmp_path / "decoded", to="fp32")
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.float32)
    unmerged = PeftModel.from_pretrained(decoded, tmp_path / "adapter").eval()
    expected = logits(unmerged)
    merged = logits(unmerged.merge_and_unload())
    exact = logits(adapted(artifact, peft.LoraConfig(target_modules=["q_proj"], r=4)).double())
    # Two computations in fp32 differ from the exact one alike: 4 times the larger error leaves room for their sum
    # and for the rounding of the merged weight, which is one of the roundings of the unmerged product.
    error = max((expected - exact).abs().max(), (logits(model) - exact).abs().max())
    assert (merged - exact).abs().max() <= 4 * error
