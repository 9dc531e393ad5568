"""Artifacts that the tests of models share."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.converters.convert import convert
from tests.small_models import llama_config, llama_tensors, write_checkpoint


@pytest.fixture(scope="session")
def smollm2_nf4(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct, converted."""
    out = tmp_path_factory.mktemp("smollm2") / "nf4"
    convert(smollm2, out)
    return out


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers and 50 tokens, converted. Tests must not modify it."""
    folder = tmp_path_factory.mktemp("random_llama")
    sizes = {"hidden": 128, "intermediate": 192, "vocabulary": 50}
    convert(write_checkpoint(folder / "source", llama_tensors(**sizes), config=llama_config(**sizes)), folder / "nf4")
    return folder / "nf4"
