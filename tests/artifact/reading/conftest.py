"""A tiny artifact, and a copy of it to damage."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.artifact.damaged import make_tiny_artifact


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "artifact")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Return a directory in memory, if the system has one, because its files are written thousands of times."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as temporary:
        yield Path(temporary)
