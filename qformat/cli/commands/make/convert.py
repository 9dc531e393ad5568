"""`qformat convert`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.checks.model_comparison import RunningComparison, comparison_json
from qformat.cli.display import echo, echo_complete, echo_json, echo_layout, format_table, some
from qformat.cli.help_sections import SectionedCommand
from qformat.cli.options import options_record, out_argument, revision_option, written_shards_options
from qformat.cli.outputs import free_in_words, free_nbytes_at, plan_json, show_shards, summary_json
from qformat.cli.progress import Bar
from qformat.errors import Option, UsageError
from qformat.sizes import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from qformat.converters.convert import ConversionOptions, ConversionSummary
    from qformat.converters.encode.plan import Plan
    from qformat.converters.encode.tasks import AdoptedTask, PackedTask
    from qformat.model.rules.expected_tensors import ModelComparison
    from qformat.quality.calibration.settings import CalibrationSettings


SECTIONS = {
    "What to quantize, and how": (
        "recipe",
        "skip",
        "block_size",
        "no_double_quant",
        "keep_nonfinite",
        "strip_wrappers",
        "index_wins",
        "no_model_check",
    ),
    "Calibration": ("calibrate", "calibration_tokens"),
    "Source on the Hub": ("revision", "offline", "keep_source"),
    "Output": ("max_shard_size", "force", "restart", "dry_run", "workers", "as_json"),
}


@dataclass(frozen=True, slots=True)
class ConvertArguments:
    """Arguments of `qformat convert`, under the names of the options."""

    source: str
    out: Path
    recipe: Path | None
    skip: tuple[str, ...]
    block_size: int | None
    no_double_quant: bool
    calibrate: tuple[str, ...]
    calibration_tokens: int | None
    keep_nonfinite: bool
    strip_wrappers: bool
    index_wins: bool
    no_model_check: bool
    revision: str | None
    offline: bool
    keep_source: bool
    workers: int | None
    max_shard_size: str
    force: bool
    restart: bool
    dry_run: bool
    as_json: bool


@click.command(
    cls=SectionedCommand,
    sections=SECTIONS,
    epilog="""\b
Examples:
  qformat convert Llama-3.2-1B Llama-3.2-1B-nf4
  qformat convert Llama-3.2-1B Llama-3.2-1B-nf4 --skip 'model.layers.0.*'
  qformat convert Llama-3.2-1B Llama-3.2-1B-nf4 --calibrate text.txt
  qformat convert Llama-3.2-1B Llama-3.2-1B-nf4 --dry-run
  qformat convert Qwen3-8B-Q6_K.gguf Qwen3-8B-nf4
  qformat convert meta-llama/Llama-3.2-1B Llama-3.2-1B-nf4 --revision main""",
)
@click.argument("source", metavar="SRC")
@out_argument()
@click.option("--recipe", metavar="FILE", type=click.Path(path_type=Path),
              help="TOML file with rules: the layers to pack, and how.")  # fmt: skip
@click.option("--skip", multiple=True, metavar="PATTERN", help="Keep matching weights in 16 bit. May be repeated.")
@click.option("--block-size", type=int, metavar="N",
              help="Number of weights that share a scale: 32, 64, 128 or 256.  [default: 64]")  # fmt: skip
@click.option("--no-double-quant", is_flag=True, help="Store the scales in float32: 0.37 bits more per weight.")
@click.option("--calibrate", multiple=True, metavar="FILE",
              help="Choose codes and scales with this text, one layer after the other: plain text, JSON Lines or "
                   "Parquet. May be repeated.")  # fmt: skip
@click.option("--calibration-tokens", type=int, metavar="N",
              help="Number of tokens to take from these texts.  [default: 16384]")  # fmt: skip
@click.option("--keep-nonfinite", is_flag=True, help="Keep weights with NaN or Inf in 16 bit. Reads SRC twice.")
@click.option("--strip-wrappers", is_flag=True,
              help="Remove from the names of tensors what wrappers put there, such as _orig_mod. (torch.compile) and "
                   "module. (DDP).")  # fmt: skip
@click.option("--index-wins", is_flag=True,
              help="Ignore tensors that the index does not assign to their shard, such as stale ones.")  # fmt: skip
@click.option("--no-model-check", is_flag=True,
              help="Do not compare names and shapes of the tensors with the model of config.json.")  # fmt: skip
@revision_option("Branch, tag or commit.  [default: main]")
@click.option("--offline", is_flag=True, help="Read the local Hub cache and make no requests.")
@click.option("--keep-source", is_flag=True, help="Download SRC into the local Hub cache and convert that copy.")
@written_shards_options("artifact")
@options_record(ConvertArguments)
def command(options: ConvertArguments) -> None:
    """Convert the checkpoint SRC into the 4-bit artifact OUT.

    SRC is a folder of safetensors or PyTorch files in 16 or 32 bit, fp8, MXFP4 or bitsandbytes' NF4, or a GGUF file;
    `qformat info` lists all formats. SRC may also be a Hub repository (owner/name) with safetensors in 16 or 32 bit,
    which is checked and encoded while it downloads and is not stored.

    transformers with bitsandbytes and PEFT load OUT without changes. vLLM from 0.28 on needs `pip install
    vllm-bnb-plugin` and loads OUT on one rank only; the plugin rounds the offset of double-quantized scales to the
    model's dtype (bf16), so that its weights differ slightly.

    Memory use does not grow with the size of the model. OUT appears only when it is complete; the same command
    resumes an interrupted conversion.
    """
    from qformat.converters.convert import plan

    chosen = _conversion_options(options)
    with RunningComparison(options.source, wanted=not options.no_model_check) as comparison:
        if options.dry_run:
            planned = plan(options.source, chosen)
            comparison.start(planned)
            comparison.refuse()
            _show_plan(planned, options.out, comparison, as_json=options.as_json)
            return
        with Bar() as bar:
            summary = _convert(options, chosen, bar, comparison)
        _show_summary(summary, comparison, as_json=options.as_json)


def _convert(
    options: ConvertArguments, chosen: ConversionOptions, bar: Bar, comparison: RunningComparison
) -> ConversionSummary:
    from qformat.converters.convert import convert

    def begin(plan: Plan) -> None:
        comparison.start(plan)
        bar.start(plan.source_nbytes, _label(plan))

    def advance(nbytes: int) -> None:
        comparison.refuse_if_known()
        bar.advance(nbytes)

    bar.note("Preparing")
    return convert(
        options.source,
        options.out,
        chosen,
        workers=options.workers,
        force=options.force,
        restart=options.restart,
        on_plan=begin,
        on_progress=advance,
        on_compile=bar.compiling,
        on_layer=bar.steps("Calibrating", "layer"),
        before_seal=comparison.refuse,
    )


def _conversion_options(options: ConvertArguments) -> ConversionOptions:
    from qformat.converters.convert import ConversionOptions

    return ConversionOptions(
        recipe=options.recipe,
        skip=options.skip,
        block_size=options.block_size,
        double_quant=False if options.no_double_quant else None,
        max_shard_nbytes=parse_nbytes(Option("max_shard_size"), options.max_shard_size),
        keep_nonfinite=options.keep_nonfinite,
        strip_wrappers=options.strip_wrappers,
        index_wins=options.index_wins,
        calibration=_calibration(options.calibrate, options.calibration_tokens),
        revision=options.revision,
        offline=options.offline,
        keep_source=options.keep_source,
    )


def _label(plan: Plan) -> str:
    return "Downloading, converting" if "repository" in plan.source else "Converting"


def _calibration(data: tuple[str, ...], n_tokens: int | None) -> CalibrationSettings | None:
    from qformat.quality.calibration.settings import DEFAULT_TOKENS, CalibrationSettings

    if not data:
        if n_tokens is not None:
            raise UsageError("--calibration-tokens: no calibration text was given. Give one with --calibrate FILE")
        return None
    return CalibrationSettings(data, DEFAULT_TOKENS if n_tokens is None else n_tokens)


def _show_plan(plan: Plan, out: Path, comparison: RunningComparison, *, as_json: bool) -> None:
    free = free_nbytes_at(out)
    if as_json:
        echo_json(plan_json(_facts(plan, comparison.result()), plan.nbytes, plan.shards, free_nbytes=free))
        return
    rows = [("action", "tensors", "source", "artifact", "why"), *_rows(plan)]
    echo_layout(format_table(rows, right=(1, 2, 3)))
    echo()
    show_shards(out, plan.shards)
    _show_notes(plan)
    comparison.show()
    echo(
        f"{format_nbytes(plan.source_nbytes)} -> {format_nbytes(plan.nbytes)} ({plan.nbytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per packed weight; {free_in_words(plan.nbytes, free)}"
    )


def _show_summary(summary: ConversionSummary, comparison: RunningComparison, *, as_json: bool) -> None:
    plan = summary.plan
    if as_json:
        found = comparison.result_at_once() if summary.already_complete else comparison.result()
        echo_json(summary_json(summary, _facts(plan, found)))
        return
    if summary.already_complete:
        echo_complete(summary.out)
        return
    echo_layout(format_table([("action", "tensors", "source", "artifact", "why"), *_rows(plan)], right=(1, 2, 3)))
    _show_notes(plan)
    comparison.show()
    rate = plan.source_nbytes / summary.seconds
    echo(
        f"{summary.out}: {format_nbytes(plan.source_nbytes)} -> {format_nbytes(plan.nbytes)} "
        f"({plan.nbytes / plan.source_nbytes:.1%}), {plan.bits_per_weight:.3f} bits per packed weight, "
        f"{summary.seconds:.1f} s, {format_nbytes(rate)}/s"
    )


def _facts(plan: Plan, comparison: ModelComparison) -> dict[str, object]:
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
        "notes": list(plan.notes),
        "left_out": dict(plan.left_out),
        "compared_with_model": comparison_json(comparison),
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
    for note in plan.notes:
        echo(f"Note: {note}")
    _show_left_out(plan)
    if unknown := _unknown(plan):
        echo(f"Kept, because it is not certain that they belong to Linear layers: {some(unknown)}. A recipe can say so")
    if vouched := [task.source.name for task in plan.packed if task.vouched]:
        echo(f"Packed, because the recipe says that they belong to Linear layers: {', '.join(vouched)}")
    if crossing := _blocks_across_rows(plan):
        echo(
            f"In {len(crossing)} weights (such as {crossing[0]}), blocks run across rows. bitsandbytes 0.50 decodes "
            "some such weights incorrectly on CPUs with AVX-512. Use a smaller --block-size, or --skip these weights"
        )
    _show_calibration(plan)


def _show_left_out(plan: Plan) -> None:
    from qformat.converters.sources.left_out import DOCUMENT

    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.left_out.items():
        if reason != DOCUMENT:  # the artifact gets a card of its own when it is published
            by_reason.setdefault(reason, []).append(name)
    if by_reason:
        parts = "; ".join(f"{some(names)} ({reason})" for reason, names in by_reason.items())
        echo(f"Not carried over: {parts}")


def _show_calibration(plan: Plan) -> None:
    record = plan.recipe.get("calibration")
    if not isinstance(record, dict):
        return
    plain = record["plain"]
    assert isinstance(plain, dict)
    echo(
        f"Calibrated {len(plan.packed) - len(plain)} of {len(plan.packed)} weights on {record['tokens']:,} tokens in "
        f"{record['windows']} windows"
    )
    for why in sorted({str(why) for why in plain.values()}):
        names = [name for name in plain if plain[name] == why]
        echo(f"Not calibrated, {why}: {some(names)}")


def _blocks_across_rows(plan: Plan) -> list[str]:
    """Return the weights whose rows are not a multiple of their block. They are valid; see docs/bitsandbytes.md."""
    weights: list[PackedTask | AdoptedTask] = [*plan.packed, *plan.adopted]
    return [task.source.name for task in weights if task.layout.shape[-1] % task.layout.block_size]


def _unknown(plan: Plan) -> list[str]:
    return [task.source.name for task in plan.kept if task.reason.value == "not_known_to_be_linear"]
