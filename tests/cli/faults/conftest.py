"""The inputs of all commands, and a stand-in of the Hub that has them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qformat.converters.export import export
from tests.cli.faults.rehearsed import Rehearsed
from tests.cli.faults.table import FORMS
from tests.hub_stand_in import Hub, point_here, running
from tests.one_thread import one_thread
from tests.quality import models
from tests.training import runs


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, artifacts, a text and training data. Tests must not change it."""
    folder = tmp_path_factory.mktemp("given")
    models.write_source(folder / "source")
    models.write_artifact(folder / "source", folder / "nf4")
    shutil.copytree(folder / "nf4", folder / "changed")
    (folder / "changed" / "generation_config.json").write_text('{"do_sample": true}\n')
    export(folder / "nf4", folder / "plain", "bf16")
    models.write_text(folder / "text.txt", n_words=400)
    runs.write_examples(folder / "examples.jsonl", 8)
    return folder


@pytest.fixture(scope="module")
def hub(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A stand-in of the Hub that holds the source and the artifact."""
    from huggingface_hub.utils import close_session

    with running(Hub(tokens={"hf_token_of_the_tests": "me"})) as hub, pytest.MonkeyPatch.context() as patched:
        point_here(patched, hub, tmp_path_factory.mktemp("hub_home"), token="hf_token_of_the_tests")
        hub.add_folder("owner/source", given / "source")
        hub.add_folder("owner/nf4", given / "nf4")
        yield hub
        close_session()


@pytest.fixture
def rehearsed(request: pytest.FixtureRequest, hub: Hub, given: Path, tmp_path: Path) -> Rehearsed:
    """A form of a command by its name in the table."""
    return Rehearsed(FORMS[request.param], given, tmp_path)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
