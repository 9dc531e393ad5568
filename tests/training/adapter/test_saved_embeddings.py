"""Adapters that PEFT wrote with embeddings: LoRA on the output layer and the embedding, new tokens, whole layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qformat.converters.convert import convert
from qformat.converters.export import export
from qformat.errors import AdapterError
from qformat.model.load import load_model, open_shards
from qformat.training.adapter.attach import load_adapter
from qformat.training.adapter.base_record import BaseRecord
from qformat.training.adapter.saved_embeddings import resize_embeddings
from tests.rounding import rounds_like
from tests.small_models import llama_config, llama_tensors, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
"""PEFT warns whenever it saves embeddings, or adapts a tied layer."""

SIZES = {"hidden": 64, "intermediate": 96, "vocabulary": 40}
TOKENS = torch.arange(16)[None]
N_RESIZED = 44

CASES: dict[str, dict[str, Any]] = {
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole layers": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}},
}


class Bases:
    """An artifact, and its decoded weights for PEFT."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        tensors = llama_tensors(**SIZES)
        if tied:
            del tensors["lm_head.weight"]
        config = {**llama_config(**SIZES), "tie_word_embeddings": tied}
        self.artifact, self.decoded = folder / "artifact", folder / "decoded"
        convert(write_checkpoint(folder / "source", tensors, config=config), self.artifact)
        export(self.artifact, self.decoded, "bf16")

    def plain(self, dtype: torch.dtype = torch.bfloat16, *, n_tokens: int = SIZES["vocabulary"]) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.decoded, dtype=dtype)
        if n_tokens != SIZES["vocabulary"]:
            model.resize_token_embeddings(n_tokens, mean_resizing=False)
        return model

    def ours(self, adapter: Path) -> Any:
        shards = open_shards(self.artifact)
        return load_adapter(load_model(shards, device="cpu"), adapter, BaseRecord.of(shards.layout))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def bases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"), tied=request.param)


def write_adapter(model: Any, folder: Path, **config: Any) -> Path:
    """Write an adapter as PEFT does, with random values in everything that it trains, and in new embeddings."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **config))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
        adapted.get_input_embeddings().weight[SIZES["vocabulary"] :] = 1
    adapted.save_pretrained(str(folder))
    return folder


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(tokens).logits
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize(
    ("case", "n_tokens"),
    [
        *((case, SIZES["vocabulary"]) for case in CASES),
        *((case, N_RESIZED) for case in ("both", "whole layers", "some tokens")),
    ],
)
def test_logits_equal_those_of_peft(case: str, n_tokens: int, bases: Bases, tmp_path: Path) -> None:
    adapter = write_adapter(bases.plain(n_tokens=n_tokens), tmp_path / "adapter", **CASES[case])
    tokens = torch.cat([TOKENS, torch.arange(n_tokens - 4, n_tokens)[None]], 1)
    theirs, exact = (
        logits(PeftModel.from_pretrained(bases.plain(dtype, n_tokens=n_tokens), str(adapter)), tokens)
        for dtype in (torch.bfloat16, torch.float32)
    )
    ours = logits(bases.ours(adapter), tokens)
    assert ours.shape[-1] == n_tokens
    assert rounds_like(ours, theirs, exact)
    assert not torch.equal(logits(bases.plain(n_tokens=n_tokens), tokens), ours)


@pytest.mark.parametrize("case", ["output layer", "embedding", "both"])
def test_the_embeddings_of_a_resized_model_must_be_there(case: str, bases: Bases, tmp_path: Path) -> None:
    """PEFT leaves out the layer that it does not train, and the caller may tell it to leave out both."""
    adapter = write_adapter(bases.plain(n_tokens=N_RESIZED), tmp_path / "adapter", **CASES[case])
    file = adapter / "adapter_model.safetensors"
    if case == "both":
        save_file({name: tensor for name, tensor in load_file(file).items() if "base_layer" not in name}, file)
    with pytest.raises(AdapterError, match=r"resized to 44 tokens \(this one has 40.*save_embedding_layers=True"):
        bases.ours(adapter)


@pytest.mark.parametrize("n_tokens", [SIZES["vocabulary"], N_RESIZED])
def test_an_output_layer_for_a_packed_one_is_refused(n_tokens: int, bases: Bases, tmp_path: Path) -> None:
    adapter = write_adapter(bases.plain(n_tokens=n_tokens), tmp_path / "adapter", **CASES["output layer"])
    model: Any = load_model(bases.artifact, device="cpu")
    model.lm_head = copy.copy(model.model.layers[0].mlp.up_proj)  # bitsandbytes can pack output layers, too
    with pytest.raises(AdapterError, match=r"brings 16-bit weights of 'lm_head', which has 4-bit weights"):
        resize_embeddings(model, load_file(adapter / "adapter_model.safetensors"), adapter)
