"""`qformat seal`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.display import echo, echo_json, echo_layout
from qformat.cli.options import artifact_argument, json_option, options_record, workers_option
from qformat.cli.progress import Bar
from qformat.cores import usable_cores

if TYPE_CHECKING:
    from qformat.artifact.manifest import FileRecord
    from qformat.artifact.writing.accept_changes import FileChange, SealResult

EXIT_NOT_ACCEPTED = 1


@dataclass(frozen=True, slots=True)
class SealArguments:
    """Arguments of `qformat seal`, under the names of the options."""

    artifact: Path
    accept: bool
    original: Path | None
    workers: int | None
    as_json: bool


@click.command(
    epilog="""\b
Examples:
  qformat seal SmolLM2-135M-Instruct-nf4 --original SmolLM2-135M-Instruct
  qformat seal SmolLM2-135M-Instruct-nf4 --accept"""
)
@artifact_argument
@click.option("--accept", is_flag=True, help="Accept the changes: renew the manifest of ART, atomically.")
@click.option("--original", metavar="DIR", type=click.Path(path_type=Path),
              help="Folder with the unmodified files, such as the source checkpoint: shows changed lines.")  # fmt: skip
@workers_option()
@json_option()
@options_record(SealArguments)
def command(options: SealArguments) -> None:
    """Show deliberate changes of an artifact's small files, and accept them into its manifest.

    Use it after editing the tokenizer, the chat template, generation_config.json or another small file of ART, or
    after another program wrote them. Weights and the index cannot be accepted: their digests are checked first. The
    manifest records which files were accepted, with their digests before and after.

    Without --accept, nothing is written, and the exit code is 1 if there are changes.
    """
    from qformat.artifact.writing.accept_changes import seal

    with Bar() as bar:
        result = seal(
            options.artifact,
            accept=options.accept,
            original=options.original,
            workers=options.workers or usable_cores(),
            on_plan=lambda nbytes: bar.start(nbytes, "Checking digests"),
            on_progress=bar.advance,
        )
    if options.as_json:
        echo_json(_facts(result))
    else:
        _show(result)
    if result.changes and not result.accepted:
        click.get_current_context().exit(EXIT_NOT_ACCEPTED)


def _facts(result: SealResult) -> dict[str, object]:
    return {
        "path": str(result.path),
        "accepted": result.accepted,
        "changes": [
            {
                "file": change.name,
                "kind": change.kind,
                "accompanies": change.accompanies,
                "before": _record(change.before),
                "after": _record(change.after),
            }
            for change in result.changes
        ],
        "signature_outdated": result.signature_outdated,
        "evaluation_removed": result.evaluation_removed,
    }


def _record(record: FileRecord | None) -> dict[str, object] | None:
    return None if record is None else {"nbytes": record.nbytes, "sha256": record.sha256}


def _show(result: SealResult) -> None:
    for change in result.changes:
        echo(f"{change.kind}: {change.name}, {_sizes(change)}")
        if change.diff is not None:
            echo_layout(change.diff)
    if not result.changes:
        echo(f"{result.path}: every file matches the manifest, nothing to accept")
        return
    n_files = len(result.changes)
    files = f"{n_files} file{'s' if n_files != 1 else ''}"
    if result.evaluation_removed:
        done = "was removed from the manifest" if result.accepted else "will be removed from the manifest"
        echo(f"Note: the evaluation describes the model before the change and {done}", err=True)
    if result.signature_outdated:
        echo("Note: model.sig does not cover the change. Sign the artifact again when you publish it", err=True)
    if result.accepted:
        echo(f"{result.path}: accepted {files}, weights intact")
    else:
        echo(f"{result.path}: {files} to accept, weights intact. To accept: qformat seal {result.path} --accept")


def _sizes(change: FileChange) -> str:
    if change.before is None or change.after is None:
        record = change.before or change.after
        return "" if record is None else f"{record.nbytes:,} bytes"
    return f"{change.before.nbytes:,} -> {change.after.nbytes:,} bytes"
