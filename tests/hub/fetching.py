"""Shared by the tests of `fetch`: the name of the repository, and a fetch with small pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qformat.hub.fetch import FetchSummary, fetch
from tests.hub.conftest import PATIENT
from tests.standstill import GUARD_S

NAME = "owner/small-nf4"


SHARD = "model-00001-of-00002.safetensors"


BODY = "GET cdn/"
"""Requests for bytes of shards."""


SMALL = replace(PATIENT, piece_nbytes=4096)


def do_fetch(
    out: Path, *, connections: int = SMALL.connections, timeout_s: float = GUARD_S, **options: object
) -> FetchSummary:
    """Fetch with small pieces and short pauses. `timeout_s` is the time without data after which a request fails."""
    patience = replace(SMALL.patience, timeout_s=timeout_s)
    transfer = replace(SMALL, connections=connections, patience=patience)
    return fetch(NAME, out, transfer=transfer, **options)  # type: ignore[arg-type]
