"""A tuning that nothing disturbs, and one thread for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qformat.quality.tuning.tune import TuningResult
from tests.quality.tuning.tuned import run


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def result(artifact: Path, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TuningResult:
    """A tuning that nothing disturbs. Not to be changed."""
    torch.set_num_threads(1)
    found = run(artifact, source, text, tmp_path_factory.mktemp("tuned") / "out")
    assert found is not None
    return found
