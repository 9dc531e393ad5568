"""Artifacts to stream to a device, and a check that no thread or file outlives a stream."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qformat.converters.convert import ConversionOptions, convert
from qformat.model.devices.shard_stream import THREAD_NAME
from tests.artifact.damaged import make_tiny_artifact, shards
from tests.small_models import write_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    source = write_llama(folder / "source", n_layers=3)
    convert(source, folder / "artifact", ConversionOptions(max_shard_nbytes=6000), workers=1)
    assert len(list(shards(folder / "artifact"))) >= 4
    return folder / "artifact"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_artifact(tmp_path)


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """Check that no thread and no open file outlives a stream."""
    before = os.listdir("/proc/self/fd")
    yield
    gc.collect()  # closes artifacts that a test has opened for comparison
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]
    assert len(os.listdir("/proc/self/fd")) <= len(before)
