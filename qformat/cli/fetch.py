"""`qformat fetch`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat import strict_json
from qformat.cli.display import progress_bar
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.hub.fetch import FetchSummary


@click.command(
    epilog="""\b
Examples:
  qformat fetch owner/SmolLM2-135M-Instruct-nf4 SmolLM2-135M-Instruct-nf4
  qformat fetch owner/SmolLM2-135M-Instruct-nf4 out --revision v1.0"""
)
@click.argument("repository", metavar="OWNER/NAME")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@click.option("--connections", type=click.IntRange(1, 64), default=8, show_default=True, help="Requests at a time.")
@click.option("--force", is_flag=True, help="Replace the artifact OUT, in one step once the new one is whole.")
@click.option("--restart", is_flag=True, help="Drop what an interrupted run left instead of continuing it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    repository: str,
    out: Path,
    revision: str | None,
    connections: int,
    force: bool,
    restart: bool,
    as_json: bool,
) -> None:
    """Download the artifact in a repository of the Hub into the folder OUT, and check every byte on the way.

    An interrupted download is continued by the same command, with the commit that it began with; nothing stands under
    OUT before it is whole. Only what the manifest lists is fetched.
    """
    from qformat.hub.fetch import fetch

    with ExitStack() as stack:
        update = None

        def start(nbytes: int) -> None:
            nonlocal update
            update = stack.enter_context(progress_bar(nbytes, "Fetching"))

        def advance(nbytes: int) -> None:
            assert update is not None
            update(nbytes)

        summary = fetch(
            repository,
            out,
            revision=revision,
            connections=connections,
            force=force,
            restart=restart,
            on_plan=start,
            on_progress=advance,
        )
    if as_json:
        click.echo(strict_json.dumps(_facts(summary), indent=2))
    else:
        _show(summary)


def _facts(summary: FetchSummary) -> dict[str, object]:
    return {
        "out": str(summary.out),
        "repository": summary.repository,
        "commit": summary.commit,
        "n_files": summary.n_files,
        "nbytes": summary.nbytes,
        "nbytes_fetched": summary.nbytes_fetched,
        "signed": summary.signed,
        "others": list(summary.others),
        "seconds": round(summary.seconds, 3),
        "already_complete": summary.already_complete,
    }


def _show(summary: FetchSummary) -> None:
    where = f"{summary.repository}@{summary.commit[:12]}"
    if summary.others:
        shown = ", ".join(summary.others[:5])
        click.echo(f"Note: {where} also holds {shown}: not in the manifest, left there", err=True)
    if summary.already_complete:
        click.echo(f"{summary.out}: was complete already; cleaned up after the earlier run")
        return
    rate = format_nbytes(summary.nbytes_fetched / max(summary.seconds, 1e-9))
    click.echo(
        f"{where} -> {summary.out}: {summary.n_files} files, {format_nbytes(summary.nbytes)}, every digest checked, "
        f"{summary.seconds:.1f} s ({rate}/s)"
    )
    if summary.signed:
        click.echo(f"signed; check it with: qformat verify {summary.out} --signature --public-key KEY.pub")
