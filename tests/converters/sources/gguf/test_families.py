"""A file of every architecture gives the parameters, the config and the logits that transformers' own reader gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qformat.converters.sources.gguf.architectures import ARCHITECTURES
from qformat.converters.sources.open_source import open_source
from tests.converters.sources.decoded_kinds import read
from tests.converters.sources.gguf.family_models import FAMILIES, VOCABULARY, write_family
from tests.converters.sources.gguf.transformers_reader import assert_equals_transformers, loaded_by_transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

NOT_READ_BY_TRANSFORMERS = {
    "nemotron": {"rope_parameters"},  # takes half of a head's dimensions, whatever the file says
    "stablelm": {"rope_parameters"},  # takes a quarter, and 10,000 as the base
}


def built(source: Any, config: Any) -> Any:
    """Return the model that a config and the tensors of a source give."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(type(config).from_dict(source.config), dtype=torch.bfloat16)
    state = {}
    for name, tensor in source.tensors.items():
        data = read(source, name, chunk_nbytes=1 << 20)
        state[name] = torch.from_numpy(data).view(torch.bfloat16).reshape(tensor.shape)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_parameters_config_and_logits_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "gguf", architecture, FAMILIES[architecture])
    assert_equals_transformers(folder, besides=NOT_READ_BY_TRANSFORMERS.get(architecture, set()))
    expected = loaded_by_transformers(folder, torch.bfloat16)
    source = open_source(folder)
    tokens = torch.arange(40)[None] % VOCABULARY
    with torch.no_grad():
        found = built(source, expected.config)(tokens).logits
        assert torch.equal(found, expected.eval()(tokens).logits)
    source.close()
    assert found.isfinite().all()
    assert found.std() > 0


def test_every_architecture_that_is_read_is_tested() -> None:
    assert ARCHITECTURES.keys() == FAMILIES.keys() | {"llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe"}
