"""`qformat train`."""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qformat.artifact.manifest import JsonObject
from qformat.cli.display import echo, echo_json, echo_layout
from qformat.cli.help_sections import SectionedCommand
from qformat.cli.options import (
    Decorator,
    Function,
    dry_run_option,
    json_option,
    options_record,
    out_argument,
    settings_of,
)
from qformat.cli.progress import StepLines
from qformat.errors import Interrupted, Option, TargetError
from qformat.sizes import format_nbytes, parse_nbytes
from qformat.training.settings import TrainingSettings, read_toml, value_type

if TYPE_CHECKING:
    from qformat.training.result import TrainingResult


SECTIONS = {
    "Data": ("data", "eval_data", "split", "eval_split", "seq_len", "too_long", "packing", "group_by_length", "loss_on",
             "skip_bad_lines"),
    "Schedule": ("max_steps", "epochs", "batch_size", "grad_accum", "learning_rate", "schedule", "warmup", "seed"),
    "Adapter": ("rank", "alpha", "dropout", "target_modules", "rslora", "dora", "bias", "modules_to_save",
                "adapter_dtype"),
    "Optimizer and memory": ("optim", "weight_decay", "max_grad_norm", "page_budget", "gradient_checkpointing",
                             "autocast", "device", "dry_run", "device_memory"),
    "Checkpoints and logs": ("save_every", "keep_checkpoints", "resume", "eval_every", "log_every", "report_to"),
    "Other": ("config", "trust_remote_code", "as_json"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainArguments:
    """Arguments of `qformat train`, under the names of the options.

    Attributes:
        settings: Settings of `TrainingSettings` by name, None if an option was not given.
    """

    artifact: str
    out: Path | None
    data: tuple[str, ...]
    eval_data: tuple[str, ...]
    split: str
    eval_split: str
    config: Path | None
    resume: str | None
    dry_run: bool
    device_memory: str | None
    as_json: bool
    settings: dict[str, Any]


def _setting_options(command: Function) -> Function:
    """Add an option for every field of `TrainingSettings`; the command gets them all as `settings`.

    An option that is not given is None, so that the value in a TOML file applies.
    """
    items = fields(TrainingSettings)
    command = settings_of([item.name for item in items], dict)(command)
    for item in reversed(items):
        command = _option(item)(command)
    return command


_METAVARS = {"page_budget": "SIZE", "device": "DEVICE"}
"""Placeholders of the settings that are not numbers."""


def _option(item: Field[Any]) -> Decorator:
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
    if choices:
        return click.option(name, type=click.Choice(choices), default=None, help=text)
    return click.option(name, metavar=_METAVARS.get(item.name, "N"), type=kind, default=None, help=text)


@click.command(
    cls=SectionedCommand,
    sections=SECTIONS,
    epilog="""\b
Examples:
  qformat train SmolLM2-135M-Instruct-nf4 adapter --data chats.jsonl
  qformat train ART adapter --data train.jsonl --eval-data test.jsonl
  qformat train ART adapter --data train.jsonl --resume
  qformat train owner/model --dry-run --seq-len 4096 --device-memory 24GiB""",
)
@click.argument("artifact", metavar="ART")
@out_argument(required=False)
@click.option("--data", metavar="DATA", multiple=True,
              help="JSON or Parquet file with text, messages, prompt and completion, ShareGPT or Alpaca rows; folder; "
                   "or a Hub dataset: owner/name[:configuration][@revision]. May be repeated.")  # fmt: skip
@click.option("--eval-data", metavar="DATA", multiple=True,
              help="Held-out data to measure the loss on before and after training.")  # fmt: skip
@click.option("--split", metavar="NAME", default="train", show_default=True,
              help="Split of --data if it is a Hub dataset.")  # fmt: skip
@click.option("--eval-split", metavar="NAME", default="test", show_default=True,
              help="Split of --eval-data if it is a Hub dataset.")  # fmt: skip
@click.option("--config", metavar="FILE", type=click.Path(path_type=Path),
              help="TOML file with settings, named like these options. Options on the command line take "
                   "precedence.")  # fmt: skip
@click.option("--resume", metavar="CHECKPOINT", is_flag=False, flag_value="latest",
              help="Resume from the latest checkpoint in OUT, or from an earlier one with --resume=checkpoint-N. The "
                   "result is bit-identical to that of an uninterrupted run.")  # fmt: skip
@dry_run_option("Only show how much device memory a training needs, and the largest batch and sequence that fit. ART "
                "may also be a 16-bit folder or a Hub repository; no weights are downloaded.")  # fmt: skip
@click.option("--device-memory", metavar="SIZE",
              help="Memory of the device for --dry-run, such as 24GiB.  [default: this machine's GPU]")  # fmt: skip
@json_option("Print one JSON object at the end.")
@_setting_options
@options_record(TrainArguments)
def command(options: TrainArguments) -> None:
    """Train the LoRA adapter OUT on artifact ART, whose packed weights stay unmodified.

    Training runs on one GPU or, slowly, on the CPU. OUT holds the adapter, checkpoints, metrics.jsonl and report.html,
    a page with the curves.
    """
    settings = _settings(options)
    if not options.dry_run and options.out is None:
        raise click.UsageError("Missing argument 'OUT'.")
    if not options.dry_run and not options.data:
        raise click.UsageError("Missing option '--data'.")
    from qformat.cli.models import quiet_transformers

    lines = StepLines()
    lines.note("Preparing")
    with lines:
        quiet_transformers()
        if options.dry_run:
            _print_plan(options, settings, lines)
        else:
            _train(options, settings, lines)


def _train(options: TrainArguments, settings: TrainingSettings, lines: StepLines) -> None:
    from qformat.report.training_page import write_training_page
    from qformat.training.run import TrainingJob, train

    out = options.out
    assert out is not None
    job = TrainingJob(Path(options.artifact), options.data, out, options.eval_data, options.split, options.eval_split)
    try:
        result = train(
            job,
            settings,
            resume=options.resume,
            say=lines.say,
            on_metrics=lambda line, n_steps: _show_metrics(lines, line, n_steps),
        )
    except KeyboardInterrupt:
        raise Interrupted("Add --resume to the same command to continue from the latest checkpoint.") from None
    lines.finish()
    page = out / "report.html"
    try:
        write_training_page(out.name, result.metrics, result.facts, page)
    except TargetError as problem:
        raise TargetError(
            f"{problem}. The adapter in {out} is complete, only its report is missing. To write the report, make room "
            "and add ",
            Option("resume", "latest"),
        ) from problem
    if options.as_json:
        echo_json(_as_record(result, page))
        return
    if result.loss_before is not None and result.loss_after is not None:
        echo(f"loss on held-out data: {result.loss_before:.4f} before, {result.loss_after:.4f} after")
    echo(f"{out}: adapter after {result.steps} steps; report: {page}")


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


def _print_plan(options: TrainArguments, settings: TrainingSettings, lines: StepLines) -> None:
    import torch

    from qformat.cli.default_conversion import as_converted
    from qformat.training.memory_plan.plan import MemoryPlanner
    from qformat.training.memory_plan.table import format_plan
    from qformat.training.memory_plan.tensors import read_model_tensors

    size = None
    if options.device_memory is not None:
        size = parse_nbytes(Option("device_memory"), options.device_memory)
    elif settings.device != "cpu" and torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
    tensors = read_model_tensors(options.artifact, conversion=as_converted)
    planner = MemoryPlanner(tensors, settings, trust_remote_code=settings.trust_remote_code)
    plan = planner.plan(device_nbytes=size)
    largest: dict[str, int] = {}
    if size is not None:
        largest = {"largest_batch": planner.largest_batch(size), "largest_sequence": planner.largest_sequence(size)}
    lines.finish()
    if options.as_json:
        echo_json({**asdict(plan), "peak": plan.peak, "fits": plan.fits, **largest})
        return
    echo_layout(format_plan(plan, **largest))


def _settings(options: TrainArguments) -> TrainingSettings:
    from_file = read_toml(options.config) if options.config is not None else {}
    from_command_line = {name: value for name, value in options.settings.items() if value not in (None, ())}
    if "max_steps" in from_command_line and "epochs" in from_command_line:
        raise click.UsageError("--max-steps and --epochs exclude each other.")
    return TrainingSettings(**{**from_file, **from_command_line})


def _show_metrics(lines: StepLines, line: JsonObject, n_steps: int) -> None:
    if "eval_loss" in line:
        lines.say(f"evaluation: loss {line['eval_loss']:.4f}, perplexity {line['eval_perplexity']:.3f}")
        return
    lines.step(
        int(_number(line["step"])),
        n_steps,
        lambda: (
            f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['tokens_per_s']:,.0f} tokens/s  "
            f"{format_nbytes(_number(line['memory_nbytes']))}"
        ),
    )


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return value
