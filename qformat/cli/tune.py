"""`qformat tune`."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qformat import strict_json
from qformat.cli.display import duration
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.quality.tuning.distillation import Closeness
    from qformat.quality.tuning.steps import StepLine
    from qformat.quality.tuning.tune import TuningResult

_SECONDS_BETWEEN_LINES = 10.0


@click.command(
    epilog="""\b
Examples:
  qformat tune SmolLM2-135M-Instruct-nf4 tuned --source SmolLM2-135M-Instruct --data texts.txt
  qformat tune ART OUT --source SRC --data chats.jsonl --data prose.txt --steps 400
  qformat tune ART OUT --source SRC --data texts.txt --teacher-cache cache"""
)
@click.argument("artifact", metavar="ART", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
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
@click.option("--device", help="cpu or cuda; by default the GPU if there is one.")
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations again in backward: less memory.")
@click.option("--save-every", type=int, default=40, show_default=True, help="Steps between checkpoints.")
@click.option("--force", is_flag=True, help="Replace an artifact OUT, in one step at the end.")
@click.option("--restart", is_flag=True, help="Drop what an interrupted run left instead of continuing it.")
@click.option("--accept-worse", is_flag=True, help="Write OUT even if held-out text says that it did not get better.")
@click.option("--use-best", is_flag=True, help="Train no further: write the best checkpoint of an interrupted run.")
@click.option("--trust-source", is_flag=True, help="Take SRC on trust where ART does not know its source's digests.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with the artifact.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def command(
    artifact: Path,
    out: Path,
    source: str,
    data: tuple[str, ...],
    teacher_cache: Path | None,
    force: bool,
    restart: bool,
    accept_worse: bool,
    use_best: bool,
    trust_source: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Tune the scales and norms of artifact ART to its 16-bit source, and write it to OUT.

    Codes and size stay as they are. A tuning that was stopped goes on with the same command.
    """
    from qformat.cli.models import quiet_transformers

    quiet_transformers()

    from qformat.quality.tuning.settings import TuningSettings
    from qformat.quality.tuning.tune import TuningJob, tune

    settings = TuningSettings(**chosen)
    progress = _Progress(settings.steps)
    started = time.monotonic()
    result = tune(
        TuningJob(artifact, source, data, out, teacher_cache),
        settings,
        force=force,
        restart=restart,
        accept_worse=accept_worse,
        use_best=use_best,
        trust_source=trust_source,
        say=progress.say,
        on_step=progress.step,
    )
    if result is None:
        click.echo(strict_json.dumps({"out": str(out), "already_complete": True}) if as_json else f"{out}: complete")
        return
    seconds = time.monotonic() - started
    if as_json:
        click.echo(strict_json.dumps(_facts(result, seconds)))
        return
    click.echo(_table(result))
    click.echo(
        f"{out}: after {result.step} steps, {result.tokens:,} tokens, {seconds:,.0f} s, "
        f"peak memory {format_nbytes(result.memory_nbytes)}"
    )


def _table(result: TuningResult) -> str:
    from qformat.cli.display import format_table

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


class _Progress:
    """Tells how far it is: at most a line every ten seconds on a file or pipe, one line in place on a terminal."""

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps
        self._started: tuple[float, int] | None = None
        self._told = 0.0
        self._in_place = sys.stderr.isatty()
        self._dirty = False

    def say(self, text: str) -> None:
        """Print a sentence."""
        if self._dirty:
            click.echo(err=True)
        self._dirty = False
        click.echo(text, err=True)

    def step(self, line: StepLine) -> None:
        """Print a step."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, line.step)
        last = line.step == self._n_steps
        if not self._in_place and not last and line.step > 1 and now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        text = (
            f"step {line.step}/{self._n_steps}  KL {line.kl:.4f}  lr {line.learning_rate:.2e}  "
            f"{line.tokens_per_s:,.0f} tokens/s  {format_nbytes(line.memory_nbytes)}"
        )
        first_time, first_step = self._started
        if line.step > first_step:
            text += f"  {duration((now - first_time) / (line.step - first_step) * (self._n_steps - line.step))} left"
        click.echo(f"\r\x1b[K{text}" if self._in_place else text, err=True, nl=not self._in_place)
        self._dirty = self._in_place
        if last:
            self.say("measuring, rounding and writing")
