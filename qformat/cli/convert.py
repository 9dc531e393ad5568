"""`qformat convert`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat import strict_json
from qformat.cli.display import format_table, progress_bar, step_bar
from qformat.errors import UsageError
from qformat.sizes import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from qformat.converters.convert import ConversionSummary
    from qformat.converters.encode.plan import AdoptedTask, PackedTask, Plan
    from qformat.quality.calibration.settings import CalibrationSettings


@click.command(
    epilog="""\b
Examples:
  qformat convert Llama-3.2-1B Llama-3.2-1B-nf4
  qformat convert Llama-3.2-1B Llama-3.2-1B-nf4 --skip 'model.layers.0.*' --block-size 128
  qformat convert Llama-3.2-1B Llama-3.2-1B-nf4 --calibrate text.txt
  qformat convert Llama-3.2-1B Llama-3.2-1B-nf4 --dry-run
  qformat convert Qwen3-8B-Q6_K.gguf Qwen3-8B-nf4
  qformat convert meta-llama/Llama-3.2-1B Llama-3.2-1B-nf4 --revision main"""
)
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML file of ordered pattern -> action rules.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Keep what matches in 16 bit. May be repeated.")
@click.option("--block-size", type=int, default=64, show_default=True, help="Weights that share a scale.")
@click.option("--no-double-quant", is_flag=True, help="Store float32 scales (0.37 bits a weight more).")
@click.option(
    "--calibrate",
    multiple=True,
    metavar="FILE",
    help="Choose codes and scales on this text, layer by layer (text, JSON lines, Parquet; may be repeated).",
)
@click.option("--calibration-tokens", type=int, metavar="N", help="Tokens of it to take.  [default: 16384]")
@click.option("--keep-nonfinite", is_flag=True, help="Keep weights with Inf or NaN in 16 bit. Reads SRC twice.")
@click.option("--revision", help="Branch, tag or commit of a repository of the Hub.  [default: main]")
@click.option("--offline", is_flag=True, help="Make no request: read the local cache of the Hub.")
@click.option("--keep-source", is_flag=True, help="Store the source in the local cache of the Hub and convert that.")
@click.option("--workers", type=int, help="Threads; any number gives the same bytes.  [default: one a core]")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest size of a shard.")
@click.option("--force", is_flag=True, help="Replace the artifact OUT, in one step once the new one is whole.")
@click.option("--restart", is_flag=True, help="Drop what an interrupted run left instead of continuing it.")
@click.option("--dry-run", is_flag=True, help="Show what would be written; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    source: str,
    out: Path,
    recipe: Path | None,
    skip: tuple[str, ...],
    block_size: int,
    no_double_quant: bool,
    calibrate: tuple[str, ...],
    calibration_tokens: int | None,
    keep_nonfinite: bool,
    revision: str | None,
    offline: bool,
    keep_source: bool,
    workers: int | None,
    max_shard_size: str,
    force: bool,
    restart: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint SRC into the 4-bit artifact OUT.

    SRC is a folder of safetensors or PyTorch files in 16 or 32 bit, fp8, MXFP4 or bitsandbytes' NF4, or a GGUF file:
    `qformat info` lists the kinds. Or it is a repository of the Hub (owner/name) with safetensors in 16 or 32 bit: it
    is fetched once, in ranges, checked and encoded on the way, and not stored.

    transformers + bitsandbytes, PEFT and vLLM load OUT as it is. Memory stays flat whatever the model's size. An
    interrupted conversion is continued by the same command; nothing stands under OUT before it is whole.
    """
    from qformat.converters.convert import ConversionOptions, convert, plan

    options = ConversionOptions(
        recipe=recipe,
        skip=skip,
        block_size=block_size,
        double_quant=not no_double_quant,
        max_shard_nbytes=parse_nbytes("--max-shard-size", max_shard_size),
        keep_nonfinite=keep_nonfinite,
        calibration=_calibration(calibrate, calibration_tokens),
        revision=revision,
        offline=offline,
        keep_source=keep_source,
    )
    if dry_run:
        _show_plan(plan(source, options), out, as_json=as_json)
        return
    bar = _Bar()
    try:
        summary = convert(
            source,
            out,
            options,
            workers=workers,
            force=force,
            restart=restart,
            on_plan=bar.start,
            on_progress=bar.update,
            on_compile=lambda: click.echo("Compiling kernels, once on this machine ...", err=True),
            on_layer=bar.show_layer,
        )
    finally:
        bar.stop()
    _show_summary(summary, as_json=as_json)


def _calibration(data: tuple[str, ...], n_tokens: int | None) -> CalibrationSettings | None:
    from qformat.quality.calibration.settings import DEFAULT_TOKENS, CalibrationSettings

    if not data:
        if n_tokens is not None:
            raise UsageError("--calibration-tokens: there is no text to take them from. Give one with --calibrate FILE")
        return None
    return CalibrationSettings(data, DEFAULT_TOKENS if n_tokens is None else n_tokens)


class _Bar:
    """The progress bar of a conversion: of bytes once the plan tells how many, then of layers that are calibrated."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._advance: Callable[[int], None] = lambda nbytes: None
        self._layers: Callable[[int], None] | None = None

    def start(self, plan: Plan) -> None:
        what = "Fetching and converting" if "repository" in plan.source else "Converting"
        self._advance = self._open.enter_context(progress_bar(plan.source_nbytes, what))

    def update(self, nbytes: int) -> None:
        self._advance(nbytes)

    def show_layer(self, done: int, total: int) -> None:
        if self._layers is None:
            self._open.close()  # the bytes are done
            self._layers = self._open.enter_context(step_bar(total, "Calibrating", "layer"))
        self._layers(done)

    def stop(self) -> None:
        self._open.close()


def _show_plan(plan: Plan, out: Path, *, as_json: bool) -> None:
    from qformat.artifact.writing.disk import free_nbytes

    free = free_nbytes(out.absolute())
    facts = {**_facts(plan), "free_nbytes": free, "fits": plan.nbytes <= free}
    if as_json:
        shards = [{"name": shard.name, "nbytes": shard.nbytes} for shard in plan.shards]
        click.echo(strict_json.dumps({**facts, "shards": shards}, indent=2))
        return
    rows = [("action", "tensors", "source", "artifact", "why"), *_rows(plan)]
    click.echo(format_table(rows, right=(1, 2, 3)))
    click.echo()
    for shard in plan.shards:
        click.echo(f"{out / shard.name}: {format_nbytes(shard.nbytes)}, {len(shard.tensors)} tensors")
    _show_notes(plan)
    click.echo(
        f"{format_nbytes(plan.source_nbytes)} -> {format_nbytes(plan.nbytes)} ({plan.nbytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits a packed weight; {format_nbytes(free)} free"
        + ("" if plan.nbytes <= free else ": NOT ENOUGH")
    )


def _show_summary(summary: ConversionSummary, *, as_json: bool) -> None:
    plan = summary.plan
    if as_json:
        facts = {
            "out": str(summary.out),
            **_facts(plan),
            "seconds": round(summary.seconds, 3),
            "already_complete": summary.already_complete,
        }
        click.echo(strict_json.dumps(facts, indent=2))
        return
    if summary.already_complete:
        click.echo(f"{summary.out}: was complete already; cleaned up after the earlier run")
        return
    click.echo(format_table([("action", "tensors", "source", "artifact", "why"), *_rows(plan)], right=(1, 2, 3)))
    _show_notes(plan)
    rate = plan.source_nbytes / summary.seconds
    click.echo(
        f"{summary.out}: {format_nbytes(plan.source_nbytes)} -> {format_nbytes(plan.nbytes)} "
        f"({plan.nbytes / plan.source_nbytes:.1%}), {plan.bits_per_weight:.3f} bits a packed weight, "
        f"{summary.seconds:.1f} s, {format_nbytes(rate)}/s"
    )


def _facts(plan: Plan) -> dict[str, object]:
    return {
        "source_nbytes": plan.source_nbytes,
        "nbytes": plan.nbytes,
        "bits_per_weight": plan.bits_per_weight,
        "packed_tensors": len(plan.packed),
        "adopted_tensors": len(plan.adopted),
        "kept_tensors": len(plan.kept),
        "kept_by_reason": dict(sorted(Counter(task.reason.value for task in plan.kept).items())),
        "vouched": [task.source.name for task in plan.packed if task.vouched],
        "not_known_to_be_linear": _unknown(plan),
        "blocks_across_rows": _blocks_across_rows(plan),
        "calibration": plan.recipe.get("calibration"),
    }


def _rows(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for action, tasks, why in (("nf4", plan.packed, "Linear weights"), ("adopt", plan.adopted, "in NF4 already")):
        if tasks or (action == "nf4" and not plan.adopted):
            source = sum(task.source_nbytes for task in tasks)
            packed = sum(place.nbytes for task in tasks for place in task.places.values())
            rows.append((action, str(len(tasks)), format_nbytes(source), format_nbytes(packed), why))
    for reason, count in sorted(Counter(task.reason for task in plan.kept).items()):
        nbytes = format_nbytes(sum(task.source_nbytes for task in plan.kept if task.reason is reason))
        rows.append(("keep", str(count), nbytes, nbytes, reason.phrase))
    return rows


def _show_notes(plan: Plan) -> None:
    if unknown := _unknown(plan):
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        click.echo(f"Kept, since it is not certain that they are Linear: {shown}. A recipe can say that they are")
    if vouched := [task.source.name for task in plan.packed if task.vouched]:
        click.echo(f"Packed because the recipe says that they are Linear: {', '.join(vouched)}")
    if crossing := _blocks_across_rows(plan):
        click.echo(
            f"In {len(crossing)} weights (such as {crossing[0]}) blocks run across rows: bitsandbytes 0.50 decodes "
            "some such weights wrongly on CPUs with AVX-512. A smaller block size, or --skip, avoids it"
        )
    _show_calibration(plan)


def _show_calibration(plan: Plan) -> None:
    record = plan.recipe.get("calibration")
    if not isinstance(record, dict):
        return
    plain = record["plain"]
    assert isinstance(plain, dict)
    click.echo(
        f"Calibrated on {record['tokens']:,} tokens in {record['windows']} windows: "
        f"{len(plan.packed) - len(plain)} of {len(plan.packed)} weights"
    )
    for why in sorted({str(why) for why in plain.values()}):
        names = [name for name in plain if plain[name] == why]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        click.echo(f"Not calibrated, {why}: {shown}")


def _blocks_across_rows(plan: Plan) -> list[str]:
    """Weights whose rows are no multiple of their block: legal, but see docs/bitsandbytes.md."""
    weights: list[PackedTask | AdoptedTask] = [*plan.packed, *plan.adopted]
    return [task.source.name for task in weights if task.layout.shape[-1] % task.layout.block_size]


def _unknown(plan: Plan) -> list[str]:
    return [task.source.name for task in plan.kept if task.reason.value == "not_known_to_be_linear"]
