"""`qformat export`."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat import strict_json
from qformat.cli.display import format_table, progress_bar
from qformat.sizes import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from qformat.converters.decode.plan import ExportPlan, ExportTask
    from qformat.converters.export import ExportSummary


@click.command(
    epilog="""\b
Examples:
  qformat export SmolLM2-135M-Instruct-nf4 SmolLM2-135M-Instruct-bf16 --to bf16
  qformat export SmolLM2-135M-Instruct-nf4 SmolLM2-135M-Instruct-fp16 --to fp16 --dry-run"""
)
@click.argument("artifact", metavar="ART", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["bf16", "fp16", "fp32"]), help="Format of the weights.")
@click.option("--shard-size", default="5GB", show_default=True, help="Largest size of a shard.")
@click.option("--workers", type=int, help="Threads; any number gives the same bytes.  [default: one a core]")
@click.option("--force", is_flag=True, help="Replace the checkpoint OUT, in one step once the new one is whole.")
@click.option("--restart", is_flag=True, help="Drop what an interrupted run left instead of continuing it.")
@click.option("--dry-run", is_flag=True, help="Show what would be written; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    artifact: Path,
    out: Path,
    to: str,
    shard_size: str,
    workers: int | None,
    force: bool,
    restart: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the 4-bit artifact in folder ART as OUT, a plain safetensors checkpoint in 16 or 32 bit.

    Everything that loads safetensors loads OUT, without bitsandbytes; what quantization has cost stays lost. Every
    digest is checked on the way. An interrupted export is continued by the same command; nothing stands under OUT
    before it is whole.
    """
    from qformat.converters.export import export, plan_export

    max_shard_nbytes = parse_nbytes("--shard-size", shard_size)
    if dry_run:
        _show_plan(plan_export(artifact, to, max_shard_nbytes=max_shard_nbytes), out, as_json=as_json)
        return
    atexit.register(_leave_quickly)
    bar = _Bar()
    try:
        summary = export(
            artifact,
            out,
            to,
            max_shard_nbytes=max_shard_nbytes,
            workers=workers,
            force=force,
            restart=restart,
            on_plan=bar.start,
            on_progress=bar.update,
            on_compile=lambda: click.echo("Compiling kernels, once on this machine ...", err=True),
        )
    finally:
        bar.stop()
    _show_summary(summary, as_json=as_json)
    _warn_of_overflow(summary.overflowed, to)


def _leave_quickly() -> None:
    """Keep the interpreter from searching all of numba's objects for cycles before it ends: 0.2 s for nothing.

    Where torch is loaded, this is no command's process, and triton would report what was not collected.
    """
    if "torch" not in sys.modules:
        gc.freeze()


class _Bar:
    """The progress bar of an export, which begins once the plan tells how much there is."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._advance: Callable[[int], None] = lambda nbytes: None

    def start(self, plan: ExportPlan) -> None:
        self._advance = self._open.enter_context(progress_bar(plan.tensor_nbytes, "Exporting"))

    def update(self, nbytes: int) -> None:
        self._advance(nbytes)

    def stop(self) -> None:
        self._open.close()


def _show_plan(plan: ExportPlan, out: Path, *, as_json: bool) -> None:
    from qformat.artifact.writing.disk import free_nbytes

    free = free_nbytes(out.absolute())
    fits = plan.nbytes <= free
    if as_json:
        shards = [{"name": shard.name, "nbytes": shard.nbytes} for shard in plan.shards]
        click.echo(strict_json.dumps({**_facts(plan), "free_nbytes": free, "fits": fits, "shards": shards}, indent=2))
        return
    click.echo(_table(plan))
    click.echo()
    for shard in plan.shards:
        click.echo(f"{out / shard.name}: {format_nbytes(shard.nbytes)}, {len(shard.tensors)} tensors")
    click.echo(
        f"{format_nbytes(plan.artifact_nbytes)} -> {format_nbytes(plan.nbytes)} ({plan.nbytes:,} bytes); "
        f"{format_nbytes(free)} free" + ("" if fits else ": NOT ENOUGH")
    )


def _show_summary(summary: ExportSummary, *, as_json: bool) -> None:
    plan = summary.plan
    if as_json:
        facts = {
            "out": str(summary.out),
            **_facts(plan),
            "overflowed": dict(summary.overflowed),
            "seconds": round(summary.seconds, 3),
            "already_complete": summary.already_complete,
        }
        click.echo(strict_json.dumps(facts, indent=2))
        return
    if summary.already_complete:
        click.echo(f"{summary.out}: was complete already; cleaned up after the earlier run")
        return
    click.echo(_table(plan))
    click.echo(
        f"{summary.out}: {format_nbytes(plan.artifact_nbytes)} -> {format_nbytes(plan.nbytes)}, "
        f"{summary.seconds:.1f} s, {format_nbytes(plan.nbytes / summary.seconds)}/s written"
    )


def _warn_of_overflow(overflowed: Mapping[str, int], to: str) -> None:
    if not overflowed:
        return
    named = [f"{name} ({count:,})" for name, count in overflowed.items()]
    shown = ", ".join(named[:5]) + (f" and {len(named) - 5} tensors more" if len(named) > 5 else "")
    click.echo(
        f"Warning: {sum(overflowed.values()):,} values are too large for {to} and became infinite, in {shown}. "
        "The model will not compute well: export it with --to bf16 or fp32",
        err=True,
    )


def _facts(plan: ExportPlan) -> dict[str, object]:
    return {
        "dtype": plan.target.value,
        "artifact_nbytes": plan.artifact_nbytes,
        "nbytes": plan.nbytes,
        "tensors": {action: len(tasks) for action, tasks in _by_action(plan).items()},
    }


def _by_action(plan: ExportPlan) -> dict[str, list[ExportTask]]:
    """Return the tasks by what happens to them: decode, cast, copy."""
    actions: dict[str, list[ExportTask]] = {"decode": [], "cast": [], "copy": []}
    for task in plan.tasks:
        actions[task.action].append(task)
    return actions


def _table(plan: ExportPlan) -> str:
    meanings = {"decode": "NF4 weights", "cast": "kept in another float format", "copy": "as they are"}
    rows: list[tuple[str, ...]] = [("action", "tensors", "written", "which")]
    for action, tasks in _by_action(plan).items():
        if tasks:
            nbytes = format_nbytes(sum(task.place.nbytes for task in tasks))
            rows.append((action, str(len(tasks)), nbytes, meanings[action]))
    return format_table(rows, right=(1, 2))
