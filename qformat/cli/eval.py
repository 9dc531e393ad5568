"""`qformat eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qformat import strict_json
from qformat.cli.display import format_table, progress_bar
from qformat.errors import TargetError, UsageError
from qformat.names import MANIFEST_NAME

if TYPE_CHECKING:
    from qformat.quality.evaluation.evaluate import Evaluation


@click.command(
    epilog="""\b
Examples:
  qformat eval SmolLM2-135M-Instruct-nf4 --source SmolLM2-135M-Instruct --data essays.txt --data code.txt
  qformat eval plain --against tuned --source SRC --data held_out.jsonl --report evaluation.html
  qformat eval ART --source owner/model --data text.txt --windows 64 --record"""
)
@click.argument("artifact", metavar="ART")
@click.option("--data", metavar="FILE", multiple=True, required=True,
              help="A text: plain, or JSON lines and Parquet as for train. Each one is a row of its own.")  # fmt: skip
@click.option("--source", metavar="SRC", help="The 16-bit model that ART was made from: a folder or owner/name.")
@click.option("--against", metavar="ART2", multiple=True, help="Another model of the same source, compared in pairs.")
@click.option("--windows", type=click.IntRange(min=1), default=16, show_default=True,
              help="Of each text, at even distances.")  # fmt: skip
@click.option("--window-length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window.")
@click.option("--report", metavar="FILE.html", type=click.Path(path_type=Path), help="Write a page that opens offline.")
@click.option("--record", is_flag=True, help="Write the result into ART's manifest.")
@click.option("--any-source", is_flag=True, help="Take SRC although ART was made from other weights.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; by default the GPU if there is one.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
              help="Of the arithmetic; another than the models' own copies what is not packed.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with the models.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    artifact: str,
    data: tuple[str, ...],
    source: str | None,
    against: tuple[str, ...],
    windows: int,
    window_length: int,
    report: Path | None,
    record: bool,
    any_source: bool,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure on texts how close the artifact ART is to its 16-bit model, token by token.

    Loss and perplexity; with --source also the divergence (KL) of the predictions and how often both find the same
    token most likely. All with their standard errors over windows; differences are paired. Any of the models may be
    an artifact, a 16-bit folder, or a repository that the Hub's cache has.
    """
    from qformat.cli.models import quiet_transformers

    _check_usage(record=record, any_source=any_source, report=report, folders=(artifact, source, *against))
    quiet_transformers()
    import torch

    from qformat.quality.evaluation.evaluate import evaluate
    from qformat.quality.evaluation.facts import facts

    with progress_bar(windows * len(data), "Measuring", unit=" windows") as update:
        result = evaluate(
            artifact,
            data,
            source=source,
            against=against,
            n_windows=windows,
            window_length=window_length,
            any_source=any_source,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            on_window=lambda done, total: update(1),
        )
    found = facts(result)
    if report is not None:
        _write_report(result, found, report, trust_remote_code=trust_remote_code)
    if record:
        _record(result, Path(artifact))
    click.echo(strict_json.dumps(found, indent=2) if as_json else _table(found))
    if not as_json:
        for name, path in (("report", report), ("recorded in", Path(artifact) / MANIFEST_NAME if record else None)):
            if path is not None:
                click.echo(f"{name}: {path}")


def _check_usage(*, record: bool, any_source: bool, report: Path | None, folders: tuple[str | None, ...]) -> None:
    """Refuse what would fail after minutes of work."""
    if record and not (Path(str(folders[0])) / MANIFEST_NAME).is_file():
        raise UsageError(
            f"--record: {folders[0]} is no folder with a manifest, {MANIFEST_NAME}, to write the result into"
        )
    if record and any_source:
        raise UsageError("--record: figures beside another model than the artifact's source would mislead its readers")
    if report is None:
        return
    folder = report.absolute().parent
    if report.is_dir() or not folder.is_dir():
        raise UsageError(f"--report {report}: is a folder, or lies in none that exists")
    for model in folders:
        if model is not None and folder.resolve().is_relative_to(Path(model).resolve()):
            raise UsageError(f"--report {report}: lies inside {model}, which must stay as it is. Choose another folder")


def _write_report(result: Evaluation, found: dict[str, Any], report: Path, *, trust_remote_code: bool) -> None:
    from qformat.model.checkpoint import find_folder
    from qformat.model.load import load_tokenizer
    from qformat.quality.evaluation.details import KL_BOUNDS, details
    from qformat.report.evaluation_page import write_evaluation_page

    found_details = []
    if result.source is not None:
        tokenizer = load_tokenizer(find_folder(result.models[0]), trust_remote_code=trust_remote_code)
        found_details = [[details(text, scores, tokenizer) for scores in text.models] for text in result.texts]
    try:
        write_evaluation_page(found, found_details, KL_BOUNDS, report)
    except OSError as error:
        raise TargetError(f"--report {report}: {error.strerror}") from error


def _record(result: Evaluation, artifact: Path) -> None:
    from qformat.artifact.writing.record_evaluation import record_evaluation
    from qformat.quality.evaluation.facts import record

    assert result.manifest is not None
    record_evaluation(artifact, record(result), of=result.manifest)


def _table(found: dict[str, Any]) -> str:
    header = ("text", "model", "perplexity", "loss", "loss - 16-bit", "KL", "top-1")
    rows: list[tuple[str, ...]] = [header]
    names = [Path(name).name for name in found["models"]]
    for text in found["texts"]:
        name = text["name"]
        if text["source"] is not None:
            rows.append((name, f"{Path(found['source']).name} (16-bit)", *_cells(text["source"])))
            name = ""
        for model, figures in zip(names, text["models"], strict=True):
            rows.append((name, model, *_cells(figures)))
            name = ""
            if "more_than_first" in figures:
                rows.append((name, f"  more than {names[0]}", *_cells(figures["more_than_first"], sign="+")))
    text = found["texts"][0]
    windows = ", ".join(str(text["windows"]) for text in found["texts"])
    note = (
        f"windows of {found['window_length']} tokens: {windows}; {found['dtype']}; ± one standard error over windows; "
        f"{found['tokens_per_s']:,.0f} tokens/s"
    )
    return f"{format_table(rows, right=range(2, len(header)))}\n{note}"


def _cells(figures: dict[str, Any], *, sign: str = "") -> tuple[str, ...]:
    spec = f"{sign}.4f"
    formats = {"perplexity": ".3f", "loss": spec, "loss_increase": "+.4f", "kl": spec, "top1_agreement": f"{sign}.2%"}
    return tuple(_cell(figures.get(name), form) for name, form in formats.items())


def _cell(figure: dict[str, float | None] | None, spec: str) -> str:
    if figure is None:
        return "-"
    mean, error = figure["mean"], figure["standard_error"]
    assert mean is not None
    return format(mean, spec) if error is None else f"{format(mean, spec)} ± {format(error, spec.lstrip('+'))}"
