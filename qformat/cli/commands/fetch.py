"""`qformat fetch`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.display import echo_json, say_complete
from qformat.cli.options import json_option, options_record, out_argument, output_options
from qformat.cli.outputs import summary_json
from qformat.cli.progress import Bar
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.hub.fetch import FetchSummary


@dataclass(frozen=True, slots=True)
class FetchArguments:
    """What is given to `qformat fetch`."""

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
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@click.option("--connections", type=click.IntRange(1, 64), default=8, show_default=True, help="Requests at a time.")
@output_options("artifact")
@json_option()
@options_record(FetchArguments)
def command(options: FetchArguments) -> None:
    """Download the artifact in a repository of the Hub into the folder OUT, and check every byte on the way.

    An interrupted download is continued by the same command, with the commit that it began with; nothing stands under
    OUT before it is whole. Only what the manifest lists is fetched.
    """
    from qformat.hub.fetch import fetch
    from qformat.hub.reading.transfer import Transfer

    with Bar() as bar:
        summary = fetch(
            options.repository,
            options.out,
            revision=options.revision,
            transfer=Transfer(connections=options.connections),
            force=options.force,
            restart=options.restart,
            on_plan=lambda nbytes: bar.start(nbytes, "Fetching"),
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
    }


def _show(summary: FetchSummary) -> None:
    where = f"{summary.repository}@{summary.commit[:12]}"
    if summary.others:
        shown = ", ".join(summary.others[:5])
        click.echo(f"Note: {where} also holds {shown}: not in the manifest, left there", err=True)
    if summary.already_complete:
        say_complete(summary.out)
        return
    rate = format_nbytes(summary.nbytes_fetched / max(summary.seconds, 1e-9))
    click.echo(
        f"{where} -> {summary.out}: {summary.n_files} files, {format_nbytes(summary.nbytes)}, every digest checked, "
        f"{summary.seconds:.1f} s ({rate}/s)"
    )
    if summary.signed:
        click.echo(f"signed; check it with: qformat verify {summary.out} --signature --public-key KEY.pub")
