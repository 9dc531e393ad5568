"""Features of transformers and torch work on a model of `load_model`: pipelines, compilation, copies."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qformat.model.load import load_tokenizer
from tests.model.sides import all_equal, backward, gradients, load_exact, load_ours, with_lora
from tests.rounding import rounds_like

PEFT_ASKS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_a_pipeline_gives_the_tokens_of_generate(smollm2_nf4: Path) -> None:
    from transformers import pipeline

    model, tokenizer = load_ours(smollm2_nf4), load_tokenizer(smollm2_nf4)
    prompt = "The capital of France is"
    generated = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = generator(prompt, max_new_tokens=12, do_sample=False, return_full_text=True)
    assert found["generated_text"] == tokenizer.decode(generated[0], skip_special_tokens=True)
    (found,) = generator(prompt, max_new_tokens=12, do_sample=False, return_tensors=True)
    assert found["generated_token_ids"] == generated[0].tolist()


@PEFT_ASKS
def test_a_compiled_model_has_the_same_gradients(random_llama: Path) -> None:
    ids = torch.arange(40)[None]
    found = []
    for compiled in (False, True):
        model = with_lora(load_ours(random_llama))
        if compiled:
            model = torch.compile(model, backend="aot_eager")
        backward(model, ids)
        found.append(gradients(getattr(model, "_orig_mod", model)))
    assert all_equal(*found)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_compiles_with_inductor(random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = load_ours(random_llama)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        exact = load_exact(random_llama)(ids, use_cache=False).logits
    assert rounds_like(found, expected, exact)  # fused operations round less often than separate ones in bf16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_of_the_config_is_complete(random_llama: Path, copied: Callable[[Any], Any]) -> None:
    config = load_ours(random_llama).config
    assert copied(config).to_dict() == config.to_dict()
