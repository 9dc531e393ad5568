"""`qformat tune`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.display import echo, echo_json, echo_layout, format_table
from qformat.cli.help_sections import SectionedCommand
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


SECTIONS = {
    "Data": ("source", "data", "seq_len", "held_out", "teacher_cache", "top_k"),
    "Schedule": ("steps", "batch_size", "learning_rate", "warmup_steps", "seed"),
    "Memory and checkpoints": ("device", "gradient_checkpointing", "save_every"),
    "Trust": ("trust_source", "trust_remote_code"),
    "Output": ("force", "restart", "accept_worse", "use_best", "as_json"),
}


@dataclass(frozen=True, slots=True)
class TuneArguments:
    """Arguments of `qformat tune`, under the names of the options."""

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
    cls=SectionedCommand,
    sections=SECTIONS,
    epilog="""\b
Examples:
  qformat tune SmolLM2-135M-Instruct-nf4 tuned \\
      --source SmolLM2-135M-Instruct --data texts.txt
  qformat tune ART OUT --source SRC --data chats.jsonl --data prose.txt
  qformat tune ART OUT --source SRC --data texts.txt --teacher-cache cache""",
)
@artifact_argument
@out_argument()
@click.option("--source", metavar="SRC", required=True, help="Source checkpoint of ART, in 16 bit.")
@click.option("--data", metavar="FILE", required=True, multiple=True,
              help="Plain text, or JSON Lines or Parquet as for `qformat train`. May be repeated.")  # fmt: skip
@click.option("--steps", metavar="N", type=int, default=160, show_default=True, help="Number of optimizer steps.")
@click.option("--learning-rate", metavar="X", type=float, default=2e-3, show_default=True,
              help="Learning rate at the end of the warm-up.")  # fmt: skip
@click.option("--warmup-steps", metavar="N", type=int, default=5, show_default=True,
              help="Number of warm-up steps.")  # fmt: skip
@click.option("--batch-size", metavar="N", type=int, default=2, show_default=True,
              help="Number of windows per step.")  # fmt: skip
@click.option("--seq-len", metavar="N", type=int, default=512, show_default=True,
              help="Number of tokens in a window.")  # fmt: skip
@click.option("--held-out", metavar="N", type=int, default=16, show_default=True,
              help="Number of windows to hold out, for measuring whether the artifact improved.")  # fmt: skip
@click.option("--teacher-cache", metavar="DIR", type=click.Path(path_type=Path),
              help="Compute the predictions of the 16-bit model first, store the most likely ones in this directory, "
                   "and tune without that model in memory.")  # fmt: skip
@click.option("--top-k", metavar="N", type=int, default=64, show_default=True,
              help="Number of predictions per token in the teacher cache.")  # fmt: skip
@click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="Seed of the order of windows.")
@device_option
@click.option("--gradient-checkpointing", is_flag=True,
              help="Recompute activations in the backward pass: slower, but less memory.")  # fmt: skip
@click.option("--save-every", metavar="N", type=int, default=40, show_default=True,
              help="Number of steps between checkpoints.")  # fmt: skip
@output_options("artifact")
@click.option("--accept-worse", is_flag=True, help="Write OUT even if it did not improve on the held-out text.")
@click.option("--use-best", is_flag=True,
              help="Stop tuning and write the best checkpoint of an interrupted run.")  # fmt: skip
@click.option("--trust-source", is_flag=True,
              help="Use SRC even if ART has no digests to recognize its source by.")  # fmt: skip
@trust_remote_code_option()
@json_option("Print the figures as one JSON object.")
@settings_of([item.name for item in fields(TuningSettings)], TuningSettings)
@options_record(TuneArguments)
def command(options: TuneArguments) -> None:
    """Tune the scales and norms of artifact ART to its 16-bit source, and write it to OUT.

    Codes and size do not change. The same command resumes an interrupted run.
    """
    from qformat.cli.models import quiet_transformers

    lines = StepLines()
    lines.note("Preparing")
    with lines:
        quiet_transformers()
        _tune(options, lines)


def _tune(options: TuneArguments, lines: StepLines) -> None:
    from qformat.quality.tuning.tune import TuningJob, tune

    settings, out = options.settings, options.out
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
    lines.finish()
    if result is None:
        if options.as_json:
            echo_json({"out": str(out), "already_complete": True}, indent=None)
        else:
            echo(f"{out}: already complete")
        return
    seconds = time.monotonic() - started
    if options.as_json:
        echo_json(_facts(result, seconds), indent=None)
        return
    echo_layout(_table(result))
    echo(
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
        lines.say("measuring, rounding and writing the artifact")


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
