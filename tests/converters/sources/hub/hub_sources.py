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
    monkeypatch: pytest.MonkeyPatch, home: Path, *, with_cdn: bool = True, token: str | None = TOKEN, attempts: int = 5
) -> Iterator[Hub]:
    """Serve an empty stand-in to this process, and make pieces, window and waits as small as the repositories."""
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(stream, "PIECE_NBYTES", 8192)
    monkeypatch.setattr(stream, "WINDOW_NBYTES", 5 * 8192)
    monkeypatch.setattr(
        transport, "DEFAULT_PATIENCE", Patience(attempts=attempts, first_wait_s=0.01, factor=1.5, timeout_s=1)
    )
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


def sealed_ranges(work: Path, source: Path) -> tuple[list[tuple[str, int, int]], int]:
    """Return (shard, start, stop) of what the journal says is encoded, and how many lines it has."""
    lines = [json.loads(line.split(" ", 1)[1]) for line in (work / "journal").read_text().splitlines()]
    sealed = {entry["tensor"] for entry in lines if "tensor" in entry}
    ranges = []
    for path in sorted(source.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name in sealed:
                start, stop = entry["data_offsets"]
                ranges.append((path.name, 8 + length + start, 8 + length + stop))
    return ranges, len(lines)


def by_shard(hub: Hub, source: Path) -> list[tuple[str, int, int]]:
    """Return what was fetched, the storage's addresses replaced by the names of the shards."""
    files = hub.repositories.by_name[NAME].head.files
    names = {f"/{files[path.name].sha256}": path.name for path in source.glob("*.safetensors")}
    return [(names.get(p.split("?")[0], p.rpartition("/")[2]), start, stop) for p, start, stop in fetched_ranges(hub)]


def overlap(ranges: list[tuple[str, int, int]], others: list[tuple[str, int, int]]) -> int:
    """Return the bytes that are in both."""
    return sum(max(0, min(b, d) - max(a, c)) for f, a, b in ranges for g, c, d in others if f == g)
