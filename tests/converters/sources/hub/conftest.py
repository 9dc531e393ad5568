"""A small repository, the stand-ins that serve it, and the result of its local conversion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.converters.sources.hub.serving import (
    NAME,
    converted,
    serving,
    write_source,
)
from tests.hub_stand_in import Hub


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small repository as a folder. Not to be changed."""
    return write_source(tmp_path_factory.mktemp("hub faults") / "source")


@pytest.fixture(scope="session")
def expected(source: Path) -> dict[str, object]:
    """Return the result of the local conversion."""
    return converted(source, source.parent / "local")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> Iterator[Hub]:
    """A stand-in that has the small repository, and a second host for its large files."""
    with serving(monkeypatch, tmp_path / "home") as hub:
        hub.add_folder(NAME, source)
        yield hub


@pytest.fixture
def plain_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> Iterator[Hub]:
    """A stand-in that sends files itself, without a second host."""
    with serving(monkeypatch, tmp_path / "home", with_cdn=False) as hub:
        hub.add_folder(NAME, source)
        yield hub
