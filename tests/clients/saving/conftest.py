"""An artifact, and the two ways to load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qformat
from tests.clients.saving.loaders import load_by
from tests.small_models import llama_config, llama_tensors, write_checkpoint

Load = Callable[[], Any]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers and several shards. Tests must not modify it."""
    folder = tmp_path_factory.mktemp("saving")
    sizes = {"hidden": 64, "intermediate": 96, "vocabulary": 50}
    source = write_checkpoint(folder / "source", llama_tensors(**sizes), config=llama_config(**sizes))
    qformat.convert(source, folder / "nf4", qformat.ConversionOptions(max_shard_nbytes=50_000))
    return folder / "nf4"


@pytest.fixture(params=["load_model", "register"])
def load(artifact: Path, request: pytest.FixtureRequest) -> Load:
    """Return a function that loads the artifact."""
    return lambda: load_by(request.param, artifact)
