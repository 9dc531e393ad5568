"""`qformat fetch`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.display import echo, echo_complete, echo_json, some
from qformat.cli.options import json_option, options_record, out_argument, output_options, revision_option
from qformat.cli.outputs import summary_json
from qformat.cli.progress import Bar
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.hub.fetch import FetchSummary


@dataclass(frozen=True, slots=True)
class FetchArguments:
    """Arguments of `qformat fetch`, under the names of the options."""

    repository: str
    out: Path
    revision: str | None
    connections: int
    force: bool
    restart: bool
    as_json: bool


@click.command(
    epilog="""\b
Examples:
  qformat fetch owner/SmolLM2-135M-Instruct-nf4 SmolLM2-135M-Instruct-nf4
  qformat fetch owner/SmolLM2-135M-Instruct-nf4 out --revision v1.0"""
)
@click.argument("repository", metavar="OWNER/NAME")
@out_argument()
@revision_option("Branch, tag or commit.  [default: main]")
@click.option("--connections", metavar="N", type=click.IntRange(1, 64), default=8, show_default=True,
              help="Number of concurrent requests.")  # fmt: skip
@output_options("artifact")
@json_option()
@options_record(FetchArguments)
def command(options: FetchArguments) -> None:
    """Download an artifact from a Hub repository into the folder OUT, and check every byte while it arrives.

    Only files that the manifest lists are downloaded. OUT appears only when it is complete. The same command resumes
    an interrupted download, at the commit that it started with.
    """
    from qformat.hub.fetch import fetch
    from qformat.hub.reading.transfer import Transfer

    with Bar() as bar:
        bar.note("Contacting the Hub")
        summary = fetch(
            options.repository,
            options.out,
            revision=options.revision,
            transfer=Transfer(connections=options.connections),
            force=options.force,
            restart=options.restart,
            on_plan=lambda nbytes: bar.start(nbytes, "Downloading"),
            on_progress=bar.advance,
        )
    if options.as_json:
        echo_json(summary_json(summary, _facts(summary)))
    else:
        _show(summary)


def _facts(summary: FetchSummary) -> dict[str, object]:
    return {
        "repository": summary.repository,
        "commit": summary.commit,
        "n_files": summary.n_files,
        "nbytes": summary.nbytes,
        "nbytes_fetched": summary.nbytes_fetched,
        "signed": summary.signed,
        "others": list(summary.others),
        "notices": [{"reason": one.reason.value, "file": one.file, "message": one.message} for one in summary.notices],
    }


def _show(summary: FetchSummary) -> None:
    where = f"{summary.repository}@{summary.commit[:12]}"
    if summary.others:
        echo(f"Note: {where} also holds files that are not in the manifest: {some(summary.others)}", err=True)
    for notice in summary.notices:
        echo(f"Notice: {notice.message}", err=True)
    if summary.already_complete:
        echo_complete(summary.out)
        return
    rate = format_nbytes(summary.nbytes_fetched / max(summary.seconds, 1e-9))
    echo(
        f"{where} -> {summary.out}: {summary.n_files} files, {format_nbytes(summary.nbytes)}, all digests checked, "
        f"{summary.seconds:.1f} s ({rate}/s)"
    )
    if summary.signed:
        echo(f"signed; check the signature: qformat verify {summary.out} --signature --public-key KEY.pub")
