"""A stand-in of the Hub that this process talks to, and a small artifact."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.hub.reading.transfer import Patience, Transfer
from tests.hub_stand_in import Hub, point_here, running
from tests.small_models import contents, write_llama
from tests.standstill import GUARD_S

TOKEN = "hf_aVerySecretToken0123456789"
PATIENT = Transfer(patience=Patience(attempts=4, first_wait_s=0.01, factor=1.5, longest_wait_s=0.05, timeout_s=GUARD_S))
"""Silence is no fault: on a machine with much to do an answer may take long."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in with a content delivery host, pages of five entries, and one token that may write."""
    from huggingface_hub import utils

    with running(Hub(tokens={TOKEN: "me"}, with_cdn=True, page_size=5)) as hub:
        point_here(monkeypatch, hub, tmp_path / "hub_home", token=TOKEN)
        yield hub
        utils.close_session()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits for seconds between its own attempts: what it does is the same without."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in three shards whose card names its licence. Not to be changed."""
    folder = write_llama(tmp_path_factory.mktemp("source") / "small", n_shards=3)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# The small model\n")
    return folder


@pytest.fixture(scope="session")
def small_artifact(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact, in several shards. Not to be changed."""
    from qformat.converters.convert import ConversionOptions

    out = tmp_path_factory.mktemp("artifact") / "small-nf4"
    convert(small_source, out, ConversionOptions(max_shard_nbytes=20_000))
    return out


@pytest.fixture
def artifact(small_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that may be changed."""
    return Path(shutil.copytree(small_artifact, tmp_path / "small-nf4"))


@pytest.fixture
def published(hub: Hub, artifact: Path) -> dict[str, bytes]:
    """Put the artifact into owner/small-nf4; return what is in it, without what the Hub adds."""
    hub.add_folder("owner/small-nf4", artifact)
    return contents(artifact)
