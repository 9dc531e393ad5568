"""An undisturbed tuning, and one thread for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qformat.quality.tuning.tune import TuningResult
from tests.one_thread import one_thread
from tests.quality.tuning.tuned import run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def result(artifact: Path, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TuningResult:
    """An undisturbed tuning. Not to be changed."""
    torch.set_num_threads(1)
    found = run(artifact, source, text, tmp_path_factory.mktemp("tuned") / "out")
    assert found is not None
    return found
