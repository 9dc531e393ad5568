"""`qformat train`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qformat import strict_json
from qformat.artifact.manifest import JsonObject
from qformat.cli.display import duration
from qformat.errors import Interrupted
from qformat.sizes import format_nbytes, parse_nbytes
from qformat.training.settings import TrainingSettings, read_toml, value_type

if TYPE_CHECKING:
    from qformat.training.run import TrainingResult

_SECONDS_BETWEEN_LINES = 10.0


def _setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of `TrainingSettings`. None stands for "not given": a TOML file may say it."""
    for item in reversed(fields(TrainingSettings)):
        command = _option(item)(command)
    return command


def _option(item: Field[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    name = "--" + item.name.replace("_", "-")
    kind = value_type(item)
    text = item.metadata["help"]
    if kind is bool:
        shown = f"{text}  [default: {'on' if item.default else 'off'}]"
        return click.option(f"{name}/--no-{name[2:]}", default=None, help=shown)
    if item.default not in (None, ()):
        text = f"{text}  [default: {' '.join(item.default) if isinstance(item.default, tuple) else item.default}]"
    if kind is tuple:
        return click.option(name, multiple=True, metavar="NAME", help=text)
    choices = item.metadata["choices"]
    return click.option(name, type=click.Choice(choices) if choices else kind, default=None, help=text)


@click.command(
    epilog="""\b
Examples:
  qformat train SmolLM2-135M-Instruct-nf4 --data chats.jsonl --output adapter
  qformat train ART --data train.jsonl --eval-data test.jsonl --output adapter --rank 32 --packing
  qformat train ART --data train.jsonl --output adapter --resume
  qformat train owner/model --dry-run --seq-len 4096 --device-memory 24GiB"""
)
@click.argument("artifact", metavar="ART")
@click.option("--data", metavar="FILE", multiple=True,
              help="JSON lines or Parquet with text, messages, or prompt and completion; a folder of them; a dataset "
                   "of the Hub: owner/name[:configuration][@revision]. May be repeated.")  # fmt: skip
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="Where the adapter goes.")
@click.option("--eval-data", metavar="FILE", multiple=True, help="Held-out data: its loss is told before and after.")
@click.option("--split", default="train", show_default=True, help="Of --data, where it is a dataset of the Hub.")
@click.option("--eval-split", default="test", show_default=True, help="Of --eval-data, likewise.")
@click.option("--config", metavar="FILE", type=click.Path(path_type=Path),
              help="TOML with the settings below; what the command line says wins.")  # fmt: skip
@click.option("--resume", metavar="CHECKPOINT", is_flag=False, flag_value="latest",
              help="Continue from the last checkpoint in DIR, or from --resume=checkpoint-N, bit for bit.")  # fmt: skip
@click.option("--dry-run", is_flag=True,
              help="Only tell how much device memory it takes, and the largest batch and sequence that fit. ART may "
                   "then also be a 16-bit folder or a repository of the Hub; no weight is fetched.")  # fmt: skip
@click.option("--device-memory", metavar="SIZE", help="For --dry-run: of the device, such as 24GiB, if not this one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@_setting_options
def command(
    artifact: str,
    data: tuple[str, ...],
    output: Path | None,
    eval_data: tuple[str, ...],
    split: str,
    eval_split: str,
    config: Path | None,
    resume: str | None,
    dry_run: bool,
    device_memory: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a LoRA adapter on the packed weights of artifact ART, on one GPU or (slowly) the CPU."""
    settings = _settings(config, given)
    if not dry_run and (not data or output is None):
        raise click.UsageError(f"Missing option '{'--output' if data else '--data'}'.")
    from qformat.cli.models import quiet_transformers

    quiet_transformers()
    if dry_run:
        _print_plan(artifact, settings, device_memory, as_json=as_json)
        return
    assert output is not None
    from qformat.report.training_page import write_training_page
    from qformat.training.run import TrainingJob, train

    job = TrainingJob(Path(artifact), data, output, eval_data, split, eval_split)
    progress = _Progress()
    try:
        result = train(job, settings, resume=resume, say=progress.say, on_metrics=progress.metrics)
    except KeyboardInterrupt:
        raise Interrupted("Add --resume to the same command to continue from the last checkpoint.") from None
    page = output / "report.html"
    write_training_page(output.name, result.metrics, result.facts, page)
    if as_json:
        click.echo(strict_json.dumps(_as_record(result, page), indent=2))
        return
    if result.loss_before is not None and result.loss_after is not None:
        click.echo(f"loss on held-out data: {result.loss_before:.4f} before, {result.loss_after:.4f} after")
    click.echo(f"{output}: adapter after {result.steps} steps; {page} shows the curves")


def _as_record(result: TrainingResult, page: Path) -> JsonObject:
    steps = [line for line in result.metrics if "loss" in line]
    return {
        "output": str(result.output),
        "report": str(page),
        "steps": result.steps,
        "loss": steps[-1]["loss"] if steps else None,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        **result.facts,
    }


def _print_plan(source: str, settings: TrainingSettings, device_memory: str | None, *, as_json: bool) -> None:
    import torch

    from qformat.cli.default_conversion import as_converted
    from qformat.training.memory_plan.plan import MemoryPlanner
    from qformat.training.memory_plan.table import format_plan
    from qformat.training.memory_plan.tensors import read_model_tensors

    size = None
    if device_memory is not None:
        size = parse_nbytes("--device-memory", device_memory)
    elif settings.device != "cpu" and torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
    tensors = read_model_tensors(source, conversion=as_converted)
    planner = MemoryPlanner(tensors, settings, trust_remote_code=settings.trust_remote_code)
    plan = planner.plan(device_nbytes=size)
    largest: dict[str, int] = {}
    if size is not None:
        largest = {"largest_batch": planner.largest_batch(size), "largest_sequence": planner.largest_sequence(size)}
    if as_json:
        click.echo(strict_json.dumps({**asdict(plan), "peak": plan.peak, "fits": plan.fits, **largest}, indent=2))
        return
    click.echo(format_plan(plan, **largest))


def _settings(config: Path | None, given: dict[str, Any]) -> TrainingSettings:
    from_file = read_toml(config) if config is not None else {}
    from_command_line = {name: value for name, value in given.items() if value not in (None, ())}
    if "max_steps" in from_command_line and "epochs" in from_command_line:
        raise click.UsageError("--max-steps and --epochs exclude each other.")
    return TrainingSettings(**{**from_file, **from_command_line})


class _Progress:
    """Tells how far it is: every line on a file or pipe at most every ten seconds, one line in place on a terminal."""

    def __init__(self) -> None:
        self._started: tuple[float, int] | None = None
        self._told = 0.0
        self._in_place = sys.stderr.isatty()
        self._dirty = False

    def say(self, text: str) -> None:
        """Print a sentence."""
        self._end_line()
        click.echo(text, err=True)

    def metrics(self, line: JsonObject, n_steps: int) -> None:
        """Print a line of metrics."""
        step, now = int(_number(line["step"])), time.monotonic()
        if "eval_loss" in line:
            self.say(f"evaluation: loss {line['eval_loss']:.4f}, perplexity {line['eval_perplexity']:.3f}")
            return
        if self._started is None:
            self._started = (now, step)
        if not self._in_place and step != n_steps and now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        first_time, first_step = self._started
        left = (now - first_time) / (step - first_step) * (n_steps - step) if step > first_step else None
        text = (
            f"step {step}/{n_steps}  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
            f"{line['tokens_per_s']:,.0f} tokens/s  {format_nbytes(_number(line['memory_nbytes']))}"
        )
        if left is not None:
            text += f"  {duration(left)} left"
        click.echo(f"\r\x1b[K{text}" if self._in_place else text, err=True, nl=not self._in_place)
        self._dirty = self._in_place
        if step == n_steps:
            self._end_line()

    def _end_line(self) -> None:
        if self._dirty:
            click.echo(err=True)
        self._dirty = False


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return value
