"""`qformat export`."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.display import echo, echo_complete, echo_json, echo_layout, format_table, some
from qformat.cli.options import artifact_argument, options_record, out_argument, written_shards_options
from qformat.cli.outputs import free_in_words, free_nbytes_at, plan_json, show_shards, summary_json
from qformat.cli.progress import Bar
from qformat.errors import Option
from qformat.sizes import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from qformat.converters.decode.plan import ExportPlan, ExportTask
    from qformat.converters.export import ExportSummary


@dataclass(frozen=True, slots=True)
class ExportArguments:
    """Arguments of `qformat export`, under the names of the options."""

    artifact: Path
    out: Path
    to: str
    max_shard_size: str
    workers: int | None
    force: bool
    restart: bool
    dry_run: bool
    as_json: bool


@click.command(
    epilog="""\b
Examples:
  qformat export SmolLM2-135M-Instruct-nf4 SmolLM2-bf16 --to bf16
  qformat export SmolLM2-135M-Instruct-nf4 out --to fp16 --dry-run"""
)
@artifact_argument
@out_argument()
@click.option("--to", required=True, type=click.Choice(["bf16", "fp16", "fp32"]), help="Dtype of the weights.")
@written_shards_options("checkpoint")
@options_record(ExportArguments)
def command(options: ExportArguments) -> None:
    """Write the 4-bit artifact in folder ART as OUT, a plain safetensors checkpoint in 16 or 32 bit.

    Any program that loads safetensors can load OUT, without bitsandbytes. The quantization error remains. Every digest
    is checked during the export. OUT appears only when it is complete; the same command resumes an interrupted export.
    """
    from qformat.converters.export import export, plan_export

    max_shard_nbytes = parse_nbytes(Option("max_shard_size"), options.max_shard_size)
    if options.dry_run:
        plan = plan_export(options.artifact, options.to, max_shard_nbytes=max_shard_nbytes)
        _show_plan(plan, options.out, as_json=options.as_json)
        return
    atexit.register(_leave_quickly)
    with Bar() as bar:
        summary = export(
            options.artifact,
            options.out,
            options.to,
            max_shard_nbytes=max_shard_nbytes,
            workers=options.workers,
            force=options.force,
            restart=options.restart,
            on_plan=lambda plan: bar.start(plan.tensor_nbytes, "Exporting"),
            on_progress=bar.advance,
            on_compile=bar.compiling,
        )
    _show_summary(summary, as_json=options.as_json)
    _warn_of_overflow(summary.overflowed, options.to)


def _leave_quickly() -> None:
    """Keep the interpreter from searching numba's objects for cycles before it exits, which takes 0.2 s.

    If torch is loaded, the process is not that of this command, and triton would report objects not collected.
    """
    if "torch" not in sys.modules:
        gc.freeze()


def _show_plan(plan: ExportPlan, out: Path, *, as_json: bool) -> None:
    free = free_nbytes_at(out)
    if as_json:
        echo_json(plan_json(_facts(plan), plan.nbytes, plan.shards, free_nbytes=free))
        return
    echo_layout(_table(plan))
    echo()
    show_shards(out, plan.shards)
    echo(
        f"{format_nbytes(plan.artifact_nbytes)} -> {format_nbytes(plan.nbytes)} ({plan.nbytes:,} bytes); "
        f"{free_in_words(plan.nbytes, free)}"
    )


def _show_summary(summary: ExportSummary, *, as_json: bool) -> None:
    plan = summary.plan
    if as_json:
        echo_json(summary_json(summary, {**_facts(plan), "overflowed": dict(summary.overflowed)}))
        return
    if summary.already_complete:
        echo_complete(summary.out)
        return
    echo_layout(_table(plan))
    echo(
        f"{summary.out}: {format_nbytes(plan.artifact_nbytes)} -> {format_nbytes(plan.nbytes)}, "
        f"{summary.seconds:.1f} s, {format_nbytes(plan.nbytes / summary.seconds)}/s written"
    )


def _warn_of_overflow(overflowed: Mapping[str, int], to: str) -> None:
    if not overflowed:
        return
    named = [f"{name} ({count:,})" for name, count in overflowed.items()]
    echo(
        f"Warning: {sum(overflowed.values()):,} values are too large for {to} and became infinite, in "
        f"{some(named, of=' tensors')}. The model will give wrong results. Export it with --to bf16 or --to fp32",
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
    """Return the tasks by action: decode, cast or copy."""
    actions: dict[str, list[ExportTask]] = {"decode": [], "cast": [], "copy": []}
    for task in plan.tasks:
        actions[task.action].append(task)
    return actions


def _table(plan: ExportPlan) -> str:
    meanings = {"decode": "NF4 weights", "cast": "kept tensors of another dtype", "copy": "unmodified kept tensors"}
    rows: list[tuple[str, ...]] = [("action", "tensors", "written", "which")]
    for action, tasks in _by_action(plan).items():
        if tasks:
            nbytes = format_nbytes(sum(task.place.nbytes for task in tasks))
            rows.append((action, str(len(tasks)), nbytes, meanings[action]))
    return format_table(rows, right=(1, 2))
