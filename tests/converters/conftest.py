"""Small checkpoints that a test may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_models import write_llama, write_tiny


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", n_shards=3)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "source")
