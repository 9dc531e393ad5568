"""A small source, the artifact that it becomes, and a directory for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import convert
from tests.converters.faulty_disk import OPTIONS, FaultyDisk
from tests.small_models import contents, write_tiny


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("interruptions") / "source", n_shards=2)


@pytest.fixture(scope="session")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of an undisturbed conversion."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(source, out, OPTIONS, disk=FaultyDisk())
    assert verify_integrity(out, sha256=True).passed
    return contents(out)
