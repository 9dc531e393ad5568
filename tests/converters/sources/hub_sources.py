"""What tests of Hub sources share: a stand-in with a small repository, small pieces, and the local conversion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.hub.reading import stream, transport
from qformat.hub.reading.transport import Patience
from tests.hub_stand_in import Hub, Request, point_here, running
from tests.small_models import llama_config, llama_tensors, write_checkpoint
from tests.standstill import GUARD_S

TOKEN = "hf_a_secret_that_must_not_get_out"
NAME = "owner/model"
SIZES = {"hidden": 64, "intermediate": 160, "n_layers": 3}
DATA = r"GET (hub|cdn)/.*(\.safetensors$|signature)"
"""Requests for bytes of shards, redirects included."""


def write_source(folder: Path, *, n_shards: int = 3) -> Path:
    """Write a checkpoint of 300 kB, several pieces of a small window."""
    tensors = llama_tensors(**SIZES)
    return write_checkpoint(folder, tensors, n_shards=n_shards, config=llama_config(**SIZES))


@contextmanager
def serving(
    monkeypatch: pytest.MonkeyPatch,
    home: Path,
    *,
    with_cdn: bool = True,
    token: str | None = TOKEN,
    attempts: int = 5,
    timeout_s: float = GUARD_S,
) -> Iterator[Hub]:
    """Serve an empty stand-in to this process, and make pieces, window and waits as small as the repositories.

    timeout_s: of silence. On a machine with much to do an answer may take long, and to ask again is a fault here.
    """
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(stream, "PIECE_NBYTES", 8192)
    monkeypatch.setattr(stream, "WINDOW_NBYTES", 5 * 8192)
    patience = Patience(attempts=attempts, first_wait_s=0.01, factor=1.5, timeout_s=timeout_s)
    monkeypatch.setattr(transport, "DEFAULT_PATIENCE", patience)
    with running(Hub(with_cdn=with_cdn, tokens={TOKEN: "user"})) as hub:
        point_here(monkeypatch, hub, home, token=token)
        yield hub
        close_session()


def without_source(folder: Path) -> dict[str, object]:
    """Return the bytes of an artifact's files, the manifest as an object without what tells the source."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads((folder / "qformat.json").read_bytes())
    del manifest["source"], manifest["manifest_sha256"]
    return {**files, "qformat.json": manifest}


def converted(source: Path, out: Path) -> dict[str, object]:
    """Return what the local conversion gives."""
    convert(source, out)
    return without_source(out)


def fetched_ranges(hub: Hub, requests: list[Request] | None = None) -> list[tuple[str, int, int]]:
    """Return (path, start, stop) of what was sent of shards."""
    found = []
    for one in hub.requests(DATA) if requests is None else requests:
        if one.status == 206 and one.nbytes_sent:
            start = int(one.headers["range"].removeprefix("bytes=").split("-")[0])
            found.append((one.path, start, start + one.nbytes_sent))
    return sorted(found)
