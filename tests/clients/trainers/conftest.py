"""A small artifact with a tokenizer for trl's trainers, and the same weights decoded to fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qformat.converters.convert import convert
from qformat.converters.export import export
from tests.one_thread import one_thread
from tests.training.runs import VOCABULARY, small_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _no_warnings_of_trainers() -> Iterator[None]:
    """Ignore what trl, PEFT and transformers warn about: deprecated names in each other's interfaces."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers. Norms of 1 and a large head let adapters change the predictions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("for_trainers")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.1,
        max_position_embeddings=512,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(4)
        model.to(torch.bfloat16).save_pretrained(folder / "source")
    small_tokenizer().save_pretrained(folder / "source")
    convert(folder / "source", folder / "nf4")
    return folder / "nf4"


@pytest.fixture(scope="session")
def decoded(artifact: Path) -> Path:
    """The artifact as a plain fp32 checkpoint."""
    export(artifact, artifact.parent / "decoded", to="fp32")
    return artifact.parent / "decoded"
