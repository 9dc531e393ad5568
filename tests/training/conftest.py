"""Fixtures of the training tests: an artifact, data, and a finished training to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qformat.training.result import TrainingResult
from tests.one_thread import one_thread
from tests.training import runs


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer. Tests must not change it."""
    return runs.make_artifact(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 24 prompts with completions."""
    return runs.write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl")


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of five other prompts with completions."""
    return runs.write_examples(tmp_path_factory.mktemp("data") / "held_out.jsonl", 5, seed=1)


@pytest.fixture(scope="session")
def undisturbed(artifact: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A complete training with SHORT settings. Tests must not change it."""
    torch.set_num_threads(1)  # session fixtures run before those of a test
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return runs.run(artifact, examples, folder / "out")
