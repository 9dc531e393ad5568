"""Models that the tests of other programs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import qformat
from tests.small_models import llama_config, llama_tensors, write_checkpoint
from tests.training.runs import make_artifact

N_TOKENS = 50


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers, 64 features and 50 tokens, converted. Tests must not modify it."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    sizes = {"hidden": 64, "intermediate": 96, "vocabulary": N_TOKENS}
    qformat.convert(
        write_checkpoint(folder / "source", llama_tensors(**sizes), config=llama_config(**sizes)), folder / "nf4"
    )
    return folder / "nf4"


@pytest.fixture(scope="session")
def decoded_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_llama` in float32, as a checkpoint that transformers loads without qformat."""
    out = tmp_path_factory.mktemp("decoded_llama") / "fp32"
    qformat.export(tiny_llama, out, "fp32")
    return out


@pytest.fixture
def registered() -> Iterator[None]:
    """Let transformers use qformat's quantizer during a test."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from qformat.model.transformers_quantizer import METHOD

    before = AUTO_QUANTIZER_MAPPING[METHOD]
    qformat.register()
    yield
    AUTO_QUANTIZER_MAPPING[METHOD] = before


@pytest.fixture(scope="session")
def speaking_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer of 320 tokens. Tests must not modify it."""
    return make_artifact(tmp_path_factory.mktemp("speaking_llama"))


@pytest.fixture(scope="session")
def decoded_speaking_llama(speaking_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `speaking_llama` in float32, as a checkpoint that transformers loads without qformat."""
    out = tmp_path_factory.mktemp("decoded_speaking_llama") / "fp32"
    qformat.export(speaking_llama, out, "fp32")
    return out
