"""A file of every architecture gives the parameters, the config and the logits that transformers' own reader gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qformat.converters.sources.open_source import open_source
from tests.converters.sources.gguf.family_models import FAMILIES, VOCABULARY, write_family
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
