"""A small source, as a repository of the Hub holds it, and the artifact of its local conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.converters.sources.hub.hub_sources import converted, write_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("hub") / "source")


@pytest.fixture(scope="session")
def expected(source: Path) -> dict[str, object]:
    return converted(source, source.parent / "local")
