"""A small artifact with a tokenizer for trl's trainers, and the same weights decoded to fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qformat.converters.export import export
from tests.clients.trainers.short_runs import small_artifact
from tests.one_thread import one_thread


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
    """A random Llama. Norms of 1 and a large head let adapters change the predictions."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("for_trainers")
    return small_artifact(folder, LlamaForCausalLM, head_scale=4, max_position_embeddings=512)


@pytest.fixture(scope="session")
def decoded(artifact: Path) -> Path:
    """The artifact as a plain fp32 checkpoint."""
    export(artifact, artifact.parent / "decoded", to="fp32")
    return artifact.parent / "decoded"
