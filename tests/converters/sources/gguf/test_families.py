"""A file of every architecture gives the parameters, the config and the logits that transformers' own reader gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qformat.converters.sources.open_source import open_source
from qformat.errors import SourceError
from tests.converters.sources.gguf.family_models import FAMILIES, VOCABULARY, Value, write_family, write_tensors
from tests.converters.sources.gguf.transformers_reader import assert_equals_transformers, built, loaded_by_transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

NOT_READ_BY_TRANSFORMERS = {
    "nemotron": {"rope_parameters"},  # takes half of a head's dimensions, whatever the file says
    "stablelm": {"rope_parameters"},  # takes a quarter, and 10,000 as the base
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_parameters_config_and_logits_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "gguf", architecture, FAMILIES[architecture])
    assert_equals_transformers(folder, besides=NOT_READ_BY_TRANSFORMERS.get(architecture, set()))
    expected = loaded_by_transformers(folder, torch.bfloat16)
    source = open_source(folder)
    tokens = torch.arange(40)[None] % VOCABULARY
    with torch.no_grad():
        found = built(source, torch.bfloat16)(tokens).logits
        assert torch.equal(found, expected.eval()(tokens).logits)
    source.close()
    assert found.isfinite().all()
    assert found.std() > 0


@pytest.mark.parametrize(
    ("architecture", "metadata", "said"),
    [
        ("lfm2", {"attention.head_count_kv": [0, 2, 2]}, "lfm2.attention.head_count_kv': expected .* array of 2"),
        ("lfm2", {"attention.head_count_kv": [1, 2]}, "4 heads of 16 dimensions in 2 groups"),
        ("olmo2", {"attention.sliding_window": 8}, "sliding_window_pattern': expected an array of 2 booleans"),
        ("gemma3", {"attention.sliding_window": 0}, "gemma3.attention.sliding_window': 0, expected"),
        ("phi3", {"rope.dimension_count": 20}, "20, expected 16"),
        ("mamba", {}, r"architecture 'mamba' is not supported \(supported: llama, .*gemma3, .*stablelm\)"),
    ],
)
def test_metadata_of_another_model_is_rejected(
    architecture: str, metadata: dict[str, Value], said: str, tmp_path: Path
) -> None:
    family = FAMILIES.get(architecture, FAMILIES["starcoder2"])
    if architecture == "olmo2":
        family = replace(family, epsilon="layer_norm_rms_epsilon")
    changed = replace(family, metadata={**family.metadata, **metadata})
    embedding = {"model.embed_tokens.weight": np.zeros((VOCABULARY, 64), np.float32)}
    if architecture == "mamba":
        embedding = {"backbone.embeddings.weight": embedding["model.embed_tokens.weight"]}
    with pytest.raises(SourceError, match=said):
        open_source(write_tensors(tmp_path / "gguf", architecture, changed, embedding))


def test_factors_of_another_length_are_rejected(tmp_path: Path) -> None:
    embedding = {"model.embed_tokens.weight": np.zeros((VOCABULARY, 64), np.float32)}
    factors = {"rope_factors_long.weight": np.ones(7, np.float32)}
    folder = write_tensors(tmp_path / "gguf", "phi3", FAMILIES["phi3"], embedding, extra=factors)
    with pytest.raises(SourceError, match=r"rope_factors_long\.weight': has 7 factors, expected 8"):
        open_source(folder)
