"""Helpers for tests of Hub sources: a stand-in, small pieces and short waits, and the local conversion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qformat.converters import convert as converting
from qformat.converters.convert import ConversionOptions, ConversionSummary
from qformat.converters.encode.plan import Plan
from qformat.hub.reading.transfer import Patience, Transfer
from tests.hub_stand_in import Hub, Request, point_here, running
from tests.small_models import llama_config, llama_tensors, write_checkpoint
from tests.standstill import GUARD_S

TOKEN = "hf_a_secret_that_must_not_get_out"
NAME = "owner/model"
SIZES = {"hidden": 64, "intermediate": 160, "n_layers": 3}
DATA = r"GET (hub|cdn)/.*(\.safetensors$|signature)"
"""Requests for bytes of shards, redirects included."""


SMALL = Transfer(
    piece_nbytes=8192,
    window_nbytes=5 * 8192,
    patience=Patience(attempts=5, first_wait_s=0.01, factor=1.5, timeout_s=GUARD_S),
)
"""Pieces, window and waits as small as the repositories.

Silence is no fault: on a machine with much to do an answer may take long, and to ask again would be wrong.
"""

IMPATIENT = replace(SMALL, patience=replace(SMALL.patience, timeout_s=1))
"""For stand-ins that are silent on purpose."""


def convert(
    source: Path | str,
    out: Path,
    options: ConversionOptions | None = None,
    *,
    transfer: Transfer = SMALL,
    **how: Any,
) -> ConversionSummary:
    """Convert with small pieces and short waits."""
    options = replace(options or ConversionOptions(), transfer=transfer)
    return converting.convert(source, out, options, **how)


def plan(source: Path | str, options: ConversionOptions | None = None) -> Plan:
    """Plan with short waits."""
    return converting.plan(source, replace(options or ConversionOptions(), transfer=SMALL))


def write_source(folder: Path, *, n_shards: int = 3) -> Path:
    """Write a checkpoint of 300 kB, several pieces of a small window."""
    tensors = llama_tensors(**SIZES)
    return write_checkpoint(folder, tensors, n_shards=n_shards, config=llama_config(**SIZES))


@contextmanager
def serving(
    monkeypatch: pytest.MonkeyPatch, home: Path, *, with_cdn: bool = True, token: str | None = TOKEN
) -> Iterator[Hub]:
    """Serve an empty stand-in to this process."""
    from huggingface_hub.utils import close_session

    with running(Hub(with_cdn=with_cdn, tokens={TOKEN: "user"})) as hub:
        point_here(monkeypatch, hub, home, token=token)
        yield hub
        close_session()


def without_source(folder: Path) -> dict[str, object]:
    """Return the bytes of an artifact's files, with the manifest as an object without its record of the source."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads((folder / "qformat.json").read_bytes())
    del manifest["source"], manifest["manifest_sha256"]
    return {**files, "qformat.json": manifest}


def converted(source: Path, out: Path) -> dict[str, object]:
    """Return the result of the local conversion."""
    convert(source, out)
    return without_source(out)


def fetched_ranges(hub: Hub, requests: list[Request] | None = None) -> list[tuple[str, int, int]]:
    """Return path, start and stop of the parts of shards that were sent."""
    found = []
    for one in hub.requests(DATA) if requests is None else requests:
        if one.status == 206 and one.nbytes_sent:
            start = int(one.headers["range"].removeprefix("bytes=").split("-")[0])
            found.append((one.path, start, start + one.nbytes_sent))
    return sorted(found)


def sealed_ranges(work: Path, source: Path) -> tuple[list[tuple[str, int, int]], int]:
    """Return shard, start and stop of what is encoded according to the journal, and the number of its lines."""
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


def by_shard(hub: Hub, source: Path, requests: list[Request] | None = None) -> list[tuple[str, int, int]]:
    """Return what was fetched, with the storage's addresses replaced by the names of the shards."""
    files = hub.repositories.by_name[NAME].head.files
    names = {f"/{files[path.name].sha256}": path.name for path in source.glob("*.safetensors")}
    return [
        (names.get(path.split("?")[0], path.rpartition("/")[2]), start, stop)
        for path, start, stop in fetched_ranges(hub, requests)
    ]


def overlap(ranges: list[tuple[str, int, int]], others: list[tuple[str, int, int]]) -> int:
    """Return the number of bytes that are in both."""
    return sum(max(0, min(b, d) - max(a, c)) for f, a, b in ranges for g, c, d in others if f == g)
