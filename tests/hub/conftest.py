"""A stand-in of the Hub for this process, and a small artifact."""

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
"""A long timeout: on a busy machine, a response may take long without a fault."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in with a content delivery host, pages of five entries, and one token with write permission."""
    from huggingface_hub import utils

    with running(Hub(tokens={TOKEN: "me"}, with_cdn=True, page_size=5)) as hub:
        point_here(monkeypatch, hub, tmp_path / "hub_home", token=TOKEN)
        yield hub
        utils.close_session()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pauses between attempts of huggingface_hub, which do not change what it does."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in three shards whose card states its licence. Tests do not modify it."""
    folder = write_llama(tmp_path_factory.mktemp("source") / "small", n_shards=3)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# The small model\n")
    return folder


@pytest.fixture(scope="session")
def small_artifact(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of that checkpoint, in several shards. Tests do not modify it."""
    from qformat.converters.convert import ConversionOptions

    out = tmp_path_factory.mktemp("artifact") / "small-nf4"
    convert(small_source, out, ConversionOptions(max_shard_nbytes=20_000))
    return out


@pytest.fixture
def artifact(small_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that tests may modify."""
    return Path(shutil.copytree(small_artifact, tmp_path / "small-nf4"))


@pytest.fixture
def published(hub: Hub, artifact: Path) -> dict[str, bytes]:
    """Store the artifact in owner/small-nf4 and return its files, without those that the Hub adds."""
    hub.add_folder("owner/small-nf4", artifact)
    return contents(artifact)
