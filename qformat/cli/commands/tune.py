"""`qformat tune`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat import strict_json
from qformat.cli.display import format_table
from qformat.cli.options import (
    artifact_argument,
    device_option,
    json_option,
    options_record,
    out_argument,
    output_options,
    settings_of,
    trust_remote_code_option,
)
from qformat.cli.progress import StepLines
from qformat.quality.tuning.settings import TuningSettings
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.quality.tuning.distillation import Closeness
    from qformat.quality.tuning.steps import StepLine
    from qformat.quality.tuning.tune import TuningResult


@dataclass(frozen=True, slots=True)
class TuneArguments:
    """What is given to `qformat tune`."""

    artifact: Path
    out: Path
    source: str
    data: tuple[str, ...]
    teacher_cache: Path | None
    force: bool
    restart: bool
    accept_worse: bool
    use_best: bool
    trust_source: bool
    as_json: bool
    settings: TuningSettings


@click.command(
    epilog="""\b
Examples:
  qformat tune SmolLM2-135M-Instruct-nf4 tuned --source SmolLM2-135M-Instruct --data texts.txt
  qformat tune ART OUT --source SRC --data chats.jsonl --data prose.txt --steps 400
  qformat tune ART OUT --source SRC --data texts.txt --teacher-cache cache"""
)
@artifact_argument
@out_argument()
@click.option("--source", metavar="SRC", required=True, help="The 16-bit checkpoint that ART was made from.")
@click.option("--data", metavar="FILE", required=True, multiple=True,
              help="Plain text, or JSON lines or Parquet as train takes them. May be repeated.")  # fmt: skip
@click.option("--steps", type=int, default=160, show_default=True, help="Optimizer steps.")
@click.option("--learning-rate", type=float, default=2e-3, show_default=True, help="At the end of the warm-up.")
@click.option("--warmup-steps", type=int, default=5, show_default=True)
@click.option("--batch-size", type=int, default=2, show_default=True, help="Windows of a step.")
@click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens of a window.")
@click.option("--held-out", type=int, default=16, show_default=True,
              help="Windows that are set aside, to tell whether it got better.")  # fmt: skip
@click.option("--teacher-cache", metavar="DIR", type=click.Path(path_type=Path),
              help="Compute the 16-bit model's predictions first, keep the most likely ones there, and tune without it "
                   "in memory.")  # fmt: skip
@click.option("--top-k", type=int, default=64, show_default=True, help="Predictions kept of a token in that cache.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of windows.")
@device_option
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations again in backward: less memory.")
@click.option("--save-every", type=int, default=40, show_default=True, help="Steps between checkpoints.")
@output_options("artifact")
@click.option("--accept-worse", is_flag=True, help="Write OUT even if held-out text says that it did not get better.")
@click.option("--use-best", is_flag=True, help="Train no further: write the best checkpoint of an interrupted run.")
@click.option("--trust-source", is_flag=True, help="Take SRC on trust where ART does not know its source's digests.")
@trust_remote_code_option()
@json_option("Print the figures as one JSON object.")
@settings_of([item.name for item in fields(TuningSettings)], TuningSettings)
@options_record(TuneArguments)
def command(options: TuneArguments) -> None:
    """Tune the scales and norms of artifact ART to its 16-bit source, and write it to OUT.

    Codes and size stay as they are. A tuning that was stopped goes on with the same command.
    """
    from qformat.cli.models import quiet_transformers

    quiet_transformers()

    from qformat.quality.tuning.tune import TuningJob, tune

    settings, out = options.settings, options.out
    lines = StepLines()
    started = time.monotonic()
    result = tune(
        TuningJob(options.artifact, options.source, options.data, out, options.teacher_cache),
        settings,
        force=options.force,
        restart=options.restart,
        accept_worse=options.accept_worse,
        use_best=options.use_best,
        trust_source=options.trust_source,
        say=lines.say,
        on_step=lambda line: _show_step(lines, line, settings.steps),
    )
    if result is None:
        complete = strict_json.dumps({"out": str(out), "already_complete": True})
        click.echo(complete if options.as_json else f"{out}: complete")
        return
    seconds = time.monotonic() - started
    if options.as_json:
        click.echo(strict_json.dumps(_facts(result, seconds)))
        return
    click.echo(_table(result))
    click.echo(
        f"{out}: after {result.step} steps, {result.tokens:,} tokens, {seconds:,.0f} s, "
        f"peak memory {format_nbytes(result.memory_nbytes)}"
    )


def _show_step(lines: StepLines, line: StepLine, n_steps: int) -> None:
    lines.step(
        line.step,
        n_steps,
        lambda: (
            f"KL {line.kl:.4f}  lr {line.learning_rate:.2e}  {line.tokens_per_s:,.0f} tokens/s  "
            f"{format_nbytes(line.memory_nbytes)}"
        ),
    )
    if line.step == n_steps:
        lines.say("measuring, rounding and writing")


def _table(result: TuningResult) -> str:
    rows: list[tuple[str, ...]] = [("held-out text", "KL", "top-1", "loss", "perplexity")]
    stages = {"before": result.before, "tuned": result.tuned, "as stored": result.after}
    rows += [(name, *_cells(closeness)) for name, closeness in stages.items()]
    return format_table(rows, right=(1, 2, 3, 4))


def _cells(closeness: Closeness) -> tuple[str, ...]:
    loss = closeness.mean("loss")
    return (
        f"{closeness.mean('kl'):.4f} ± {closeness.error('kl'):.4f}",
        f"{closeness.mean('top1'):.2%}",
        f"{loss:.4f}",
        f"{math.exp(min(loss, 700)):.3f}",
    )


def _facts(result: TuningResult, seconds: float) -> dict[str, object]:
    def figures(closeness: Closeness) -> dict[str, object]:
        found: dict[str, object] = {}
        for name in ("kl", "top1", "loss"):
            error = closeness.error(name)
            found[name] = {"mean": closeness.mean(name), "standard_error": None if math.isnan(error) else error}
        return found

    return {
        "out": str(result.out),
        "step": result.step,
        "tokens": result.tokens,
        "before": figures(result.before),
        "before_rounding": figures(result.tuned),
        "after": figures(result.after),
        "seconds": seconds,
        "peak_memory_nbytes": result.memory_nbytes,
    }
