"""Plans and summaries of commands that write an output: its files, the free disk space and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qformat.cli.display import echo
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.artifact.layout import Shard
    from qformat.converters.convert import ConversionSummary
    from qformat.converters.export import ExportSummary
    from qformat.hub.fetch import FetchSummary


def summary_json(
    done: ConversionSummary | ExportSummary | FetchSummary, facts: Mapping[str, object]
) -> dict[str, object]:
    """Return a summary as plain JSON values.

    Args:
        done: Summary of the finished run.
        facts: Values that only this command reports.

    Returns:
        The JSON object.
    """
    took = {"seconds": round(done.seconds, 3), "already_complete": done.already_complete}
    return {"out": str(done.out), **facts, **took}


def free_nbytes_at(out: Path) -> int:
    """Return the number of free bytes on the disk that an output will be written to."""
    from qformat.artifact.writing.disk import Disk

    return Disk().free_nbytes(out.absolute())


def plan_json(
    facts: Mapping[str, object], nbytes: int, shards: Sequence[Shard], *, free_nbytes: int
) -> dict[str, object]:
    """Return a plan as plain JSON values.

    Args:
        facts: Values that only this command reports.
        nbytes: Size of the whole output in bytes.
        shards: Shards that would be written.
        free_nbytes: Free bytes on the disk of the output.

    Returns:
        The JSON object.
    """
    files = [{"name": shard.name, "nbytes": shard.nbytes} for shard in shards]
    return {**facts, "free_nbytes": free_nbytes, "fits": nbytes <= free_nbytes, "shards": files}


def show_shards(out: Path, shards: Sequence[Shard]) -> None:
    """Print one line per shard.

    Args:
        out: Directory of the output.
        shards: Shards that would be written.
    """
    for shard in shards:
        echo(f"{out / shard.name}: {format_nbytes(shard.nbytes)}, {len(shard.tensors)} tensors")


def free_in_words(nbytes: int, free_nbytes: int) -> str:
    """Return the free disk space as text, with a warning if the output does not fit.

    Args:
        nbytes: Size of the whole output in bytes.
        free_nbytes: Free bytes on the disk of the output.

    Returns:
        The text.
    """
    return f"{format_nbytes(free_nbytes)} free" + ("" if nbytes <= free_nbytes else ": NOT ENOUGH")
