"""What a command that writes an output tells: its files and the room for them beforehand, and what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.artifact.layout import Shard
    from qformat.converters.convert import ConversionSummary
    from qformat.converters.export import ExportSummary
    from qformat.hub.fetch import FetchSummary


def summary_json(
    done: ConversionSummary | ExportSummary | FetchSummary, facts: Mapping[str, object]
) -> dict[str, object]:
    """Return what was written as plain JSON values. facts: what the command tells of it."""
    took = {"seconds": round(done.seconds, 3), "already_complete": done.already_complete}
    return {"out": str(done.out), **facts, **took}


def free_nbytes_at(out: Path) -> int:
    """Return the bytes that are free where an output is to be written."""
    from qformat.artifact.writing.disk import Disk

    return Disk().free_nbytes(out.absolute())


def plan_json(
    facts: Mapping[str, object], nbytes: int, shards: Sequence[Shard], *, free_nbytes: int
) -> dict[str, object]:
    """Return a plan as plain JSON values. facts: what the command tells of it. nbytes: of the whole output."""
    files = [{"name": shard.name, "nbytes": shard.nbytes} for shard in shards]
    return {**facts, "free_nbytes": free_nbytes, "fits": nbytes <= free_nbytes, "shards": files}


def show_shards(out: Path, shards: Sequence[Shard]) -> None:
    """Print a line a shard."""
    for shard in shards:
        click.echo(f"{out / shard.name}: {format_nbytes(shard.nbytes)}, {len(shard.tensors)} tensors")


def free_in_words(nbytes: int, free_nbytes: int) -> str:
    """Return how much is free, and whether so many bytes fit."""
    return f"{format_nbytes(free_nbytes)} free" + ("" if nbytes <= free_nbytes else ": NOT ENOUGH")
