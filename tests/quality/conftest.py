"""Tiny models and texts shared by the tests of quality, which must not change them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quality import models


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_source(tmp_path_factory.mktemp("quality") / "source")


@pytest.fixture(scope="session")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_artifact(source, tmp_path_factory.mktemp("quality") / "nf4")


@pytest.fixture(scope="session")
def coarse(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact in blocks of 256."""
    return models.write_artifact(source, tmp_path_factory.mktemp("quality") / "coarse", block_size=256)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_text(tmp_path_factory.mktemp("quality") / "words.txt")
