"""`qformat eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qformat.cli.display import echo, echo_json, echo_layout, format_table
from qformat.cli.help_sections import SectionedCommand
from qformat.cli.options import (
    device_option,
    json_option,
    options_record,
    refuse_report_in,
    report_option,
    trust_remote_code_option,
)
from qformat.cli.progress import Bar
from qformat.errors import UsageError
from qformat.names import MANIFEST_NAME

if TYPE_CHECKING:
    from qformat.quality.evaluation.evaluate import Evaluation


SECTIONS = {
    "What to compare": ("data", "source", "against", "any_source"),
    "How to score": ("windows", "seq_len", "device", "dtype", "trust_remote_code"),
    "Output": ("report", "record", "as_json"),
}


@dataclass(frozen=True, slots=True)
class EvalArguments:
    """Arguments of `qformat eval`, under the names of the options."""

    artifact: str
    data: tuple[str, ...]
    source: str | None
    against: tuple[str, ...]
    windows: int
    seq_len: int
    report: Path | None
    record: bool
    any_source: bool
    device: str | None
    dtype: str | None
    trust_remote_code: bool
    as_json: bool


@click.command(
    cls=SectionedCommand,
    sections=SECTIONS,
    epilog="""\b
Examples:
  qformat eval SmolLM2-135M-Instruct-nf4 --source SmolLM2-135M-Instruct \\
      --data essays.txt --data code.txt
  qformat eval plain --against tuned --source SRC --data held_out.jsonl
  qformat eval ART --source owner/model --data text.txt --windows 64 --record""",
)
@click.argument("artifact", metavar="ART")
@click.option("--data", metavar="FILE", multiple=True, required=True,
              help="Plain text, or JSON Lines or Parquet as for `qformat train`. May be repeated; each file is scored "
                   "separately.")  # fmt: skip
@click.option("--source", metavar="SRC", help="16-bit source checkpoint of ART, a folder or owner/name.")
@click.option("--against", metavar="ART2", multiple=True,
              help="Another model with the same source, for a paired comparison. May be repeated.")  # fmt: skip
@click.option("--windows", metavar="N", type=click.IntRange(min=1), default=16, show_default=True,
              help="Number of evenly spaced windows to score per text.")  # fmt: skip
@click.option("--seq-len", metavar="N", type=click.IntRange(min=2), default=512, show_default=True,
              help="Number of tokens in a window.")  # fmt: skip
@report_option
@click.option("--record", is_flag=True, help="Write the result into ART's manifest.")
@click.option("--any-source", is_flag=True, help="Accept SRC even if ART was made from other weights.")
@device_option
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
              help="Dtype to compute in. If it differs from that of a model, the kept tensors are "
                   "copied.  [default: the dtype of each model]")  # fmt: skip
@trust_remote_code_option("the models")
@json_option()
@options_record(EvalArguments)
def command(options: EvalArguments) -> None:
    """Measure how close the predictions of artifact ART are to those of its 16-bit source.

    Reports loss and perplexity on texts. With --source, it also reports the KL divergence of the predictions and how
    often both models predict the same token (top-1). Every figure has its standard error over windows, and differences
    are paired. Each model may be an artifact, a 16-bit folder, or a repository in the local Hub cache.
    """
    _check_usage(options)
    with Bar() as bar:
        bar.note("Loading")
        result = _evaluate(options, bar)
    from qformat.quality.evaluation.facts import facts

    found: dict[str, Any] = facts(result)
    if options.report is not None:
        _write_report(result, found, options.report, trust_remote_code=options.trust_remote_code)
    if options.record:
        _record(result, Path(options.artifact))
    if options.as_json:
        echo_json(found)
        return
    for text in found["texts"]:
        echo_layout(_table(found, text) + "\n")
    echo(_note(found))
    if options.report is not None:
        echo(f"report: {options.report}")
    if options.record:
        echo(f"recorded in: {Path(options.artifact) / MANIFEST_NAME}")


def _check_usage(options: EvalArguments) -> None:
    """Reject what would fail after minutes of work."""
    if options.record and not (Path(options.artifact) / MANIFEST_NAME).is_file():
        raise UsageError(f"--record: {options.artifact} is not a folder with a manifest ({MANIFEST_NAME})")
    if options.record and options.any_source:
        raise UsageError("--record: figures against a model that is not the artifact's source would mislead readers")
    if options.record:
        from qformat.artifact.writing.disk import Disk

        Disk().check_can_replace(Path(options.artifact) / MANIFEST_NAME)
    if options.report is not None:
        source = () if options.source is None else (options.source,)
        refuse_report_in(options.report, options.artifact, *source, *options.against)


def _evaluate(options: EvalArguments, bar: Bar) -> Evaluation:
    from qformat.cli.models import quiet_transformers

    quiet_transformers()
    import torch

    from qformat.quality.evaluation.evaluate import evaluate

    with bar.while_compiling():
        return evaluate(
            options.artifact,
            options.data,
            source=options.source,
            against=options.against,
            n_windows=options.windows,
            window_length=options.seq_len,
            any_source=options.any_source,
            device=options.device,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            trust_remote_code=options.trust_remote_code,
            on_window=bar.steps("Scoring", "window"),
        )


def _write_report(result: Evaluation, found: dict[str, Any], report: Path, *, trust_remote_code: bool) -> None:
    from qformat.model.checkpoint import find_folder
    from qformat.model.load import load_tokenizer
    from qformat.quality.evaluation.details import KL_BOUNDS, details
    from qformat.report.evaluation_page import write_evaluation_page

    found_details = []
    if result.source is not None:
        tokenizer = load_tokenizer(find_folder(result.models[0]), trust_remote_code=trust_remote_code)
        found_details = [[details(text, scores, tokenizer) for scores in text.models] for text in result.texts]
    write_evaluation_page(found, found_details, KL_BOUNDS, report)


def _record(result: Evaluation, artifact: Path) -> None:
    from qformat.artifact.writing.record_evaluation import record_evaluation
    from qformat.quality.evaluation.facts import record

    assert result.manifest is not None
    record_evaluation(artifact, record(result), of=result.manifest)


_ROWS = (
    ("perplexity", "perplexity", ".3f", ".3f"),
    ("loss", "loss", ".4f", "+.4f"),
    ("loss - 16-bit", "loss_increase", "+.4f", "+.4f"),
    ("KL", "kl", ".4f", "+.4f"),
    ("top-1", "top1_agreement", ".2%", "+.2%"),
)
"""Label and name of each figure, and its formats in the columns of models and of differences."""


def _table(found: dict[str, Any], text: dict[str, Any]) -> str:
    """Return the figures of a text: a column per model, and one for its difference from the first artifact."""
    columns: list[tuple[str, dict[str, Any], bool]] = []
    if text["source"] is not None:
        columns.append((f"{Path(found['source']).name} (16-bit)", text["source"], False))
    for model, figures in zip(found["models"], text["models"], strict=True):
        columns.append((Path(model).name, figures, False))
        if "more_than_first" in figures:
            columns.append(("difference", figures["more_than_first"], True))
    rows = [(text["name"], *(header for header, _, _ in columns))]
    for label, name, spec, spec_of_difference in _ROWS:
        cells = [
            _cell(figures.get(name), spec_of_difference if is_difference else spec)
            for _, figures, is_difference in columns
        ]
        if {*cells} != {"-"}:
            rows.append((label, *cells))
    return format_table(rows, right=range(1, len(rows[0])))


def _note(found: dict[str, Any]) -> str:
    windows = ", ".join(str(text["windows"]) for text in found["texts"])
    difference = "difference: from the first artifact, paired; " if len(found["models"]) > 1 else ""
    return (
        f"windows of {found['window_length']} tokens: {windows}; {found['dtype']}; ± one standard error over windows; "
        f"{difference}{found['tokens_per_s']:,.0f} tokens/s"
    )


def _cell(figure: dict[str, float | None] | None, spec: str) -> str:
    if figure is None:
        return "-"
    mean, error = figure["mean"], figure["standard_error"]
    assert mean is not None
    return format(mean, spec) if error is None else f"{format(mean, spec)} ± {format(error, spec.lstrip('+'))}"
