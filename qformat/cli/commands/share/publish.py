"""`qformat publish`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.checks.verified import verified
from qformat.cli.display import echo, echo_json, echo_layout, format_table, some
from qformat.cli.help_sections import SectionedCommand
from qformat.cli.messages import as_flag
from qformat.cli.options import artifact_argument, dry_run_option, json_option, options_record, workers_option
from qformat.cli.progress import Bar
from qformat.errors import UsageError, VerificationError, on_lines, spelled
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.hub.card.error_figures import ErrorFigures
    from qformat.hub.card.prepared_card import CardOptions
    from qformat.hub.publishing.publish import Published, PublishOptions


SECTIONS = {
    "Model card": ("source", "figures", "base_model", "license_id", "license_name", "license_link", "confirm_license",
                   "card"),
    "Repository": ("private", "revision", "create_pr", "sign_key"),
    "Output": ("dry_run", "workers", "as_json"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PublishArguments:
    """Arguments of `qformat publish`, under the names of the options."""

    artifact: Path
    repository: str
    source: str | None
    figures: Path | None
    base_model: str | None
    license_id: str | None
    license_name: str | None
    license_link: str | None
    confirm_license: bool
    card: Path | None
    private: bool
    revision: str | None
    create_pr: bool
    sign_key: Path | None
    dry_run: bool
    workers: int | None
    as_json: bool


@click.command(
    cls=SectionedCommand,
    sections=SECTIONS,
    epilog="""\b
Examples:
  qformat publish SmolLM2-135M-Instruct-nf4 me/SmolLM2-135M-Instruct-nf4 \\
      --source SmolLM2-135M-Instruct --dry-run
  qformat publish SmolLM2-135M-Instruct-nf4 me/SmolLM2-135M-Instruct-nf4 \\
      --base-model HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0""",
)
@artifact_argument
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--source", metavar="SRC",
              help="Compare with this source checkpoint, a folder or owner/name. The card shows the errors and takes "
                   "over the licence.")  # fmt: skip
@click.option("--figures", metavar="FILE.json", type=click.Path(path_type=Path),
              help="Output of `qformat verify --source --json`, to avoid comparing again.")  # fmt: skip
@click.option("--base-model", metavar="OWNER/NAME",
              help="Hub repository of the source model, if the manifest does not name it.")  # fmt: skip
@click.option("--license", "license_id", metavar="ID",
              help="Licence of the source model by its Hub identifier, such as apache-2.0 or other.")  # fmt: skip
@click.option("--license-name", metavar="NAME", help="Name of the licence if its identifier is 'other'.")
@click.option("--license-link", metavar="URL", help="Address of the licence text if its identifier is 'other'.")
@click.option("--confirm-license", is_flag=True,
              help="Publish even if the licence is missing or forbids derivatives.")  # fmt: skip
@click.option("--card", metavar="FILE", type=click.Path(path_type=Path),
              help="Publish this README.md instead of a generated card.")  # fmt: skip
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", metavar="BRANCH",
              help="Branch to publish to, created if it does not exist.  [default: main]")  # fmt: skip
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--sign-key", metavar="KEY.pem", type=click.Path(path_type=Path),
              help="Sign with this elliptic-curve key (OpenSSF model signing).")  # fmt: skip
@dry_run_option("Show the files and the card that would be uploaded, and upload nothing.")
@workers_option()
@json_option()
@options_record(PublishArguments)
def command(options: PublishArguments) -> None:
    """Publish the artifact in folder ART as a Hub repository with a model card.

    Every byte is verified first, and a damaged artifact is rejected. Files that the repository already has are not
    uploaded again; publishing the same artifact twice changes nothing. The token comes from HF_TOKEN or `hf auth
    login`.
    """
    from qformat.hub.names import check_repository_name
    from qformat.hub.publishing.publish import publish

    check_repository_name(options.repository)
    _check_usage(options)
    chosen = _publish_options(options)
    card = _card_options(options)
    with Bar() as bar:
        published = publish(
            options.artifact,
            options.repository,
            card,
            chosen,
            workers=options.workers,
            on_plan=lambda nbytes: bar.start(nbytes, "Checking digests"),
            on_progress=bar.advance,
            on_upload=lambda _: bar.clear(),  # huggingface_hub shows bars of its own for an upload
        )
    if options.as_json:
        echo_json(_facts(published))
    else:
        _show(published)


def _check_usage(options: PublishArguments) -> None:
    """Reject options that exclude each other."""
    if options.license_id is None and (options.license_name or options.license_link):
        raise UsageError(
            "--license-name and --license-link describe a licence. Give its identifier with --license, too"
        )
    if options.card is not None and (options.source or options.figures or options.base_model or options.license_id):
        raise UsageError("--card is published unmodified. Remove --source, --figures, --base-model and --license")
    if options.source is not None and options.figures is not None:
        raise UsageError("--source compares again and --figures reads an earlier comparison. Give only one of them")


def _publish_options(options: PublishArguments) -> PublishOptions:
    from qformat.hub.publishing.publish import PublishOptions

    return PublishOptions(
        revision=options.revision,
        private=options.private,
        create_pr=options.create_pr,
        sign_key=options.sign_key,
        confirm_license=options.confirm_license,
        dry_run=options.dry_run,
    )


def _card_options(options: PublishArguments) -> CardOptions:
    from qformat.converters.sources.open_source import is_repository
    from qformat.hub.card.licenses import License
    from qformat.hub.card.prepared_card import CardOptions

    source, license_id = options.source, options.license_id
    return CardOptions(
        card=options.card,
        base_model=options.base_model or (source if source is not None and is_repository(source) else None),
        source=Path(source) if source is not None and Path(source).is_dir() else None,
        license=None if license_id is None else License(license_id, options.license_name, options.license_link),
        figures=_figures(options),
    )


def _figures(options: PublishArguments) -> ErrorFigures | None:
    """Compare with the source, or read the result of an earlier comparison."""
    from qformat.artifact.reading.structure import read_manifest
    from qformat.hub.card.error_figures import ErrorFigures, read_error_figures

    artifact, source = options.artifact, options.source
    if options.figures is not None:
        return read_error_figures(options.figures, read_manifest(artifact))
    if source is None:
        return None
    found = verified(artifact, source, workers=options.workers)
    if not found.passed or found.integrity.manifest is None:
        shown = on_lines([finding.message for finding in found.findings[:3]])
        raise VerificationError(f"{artifact}: does not match its source {source}, and was not published:", *shown)
    return ErrorFigures.parse(found.to_json(), found.integrity.manifest, source)


def _facts(published: Published) -> dict[str, object]:
    return {
        "repository": published.repository,
        "revision": published.revision,
        "commit": published.commit,
        "pull_request": published.pull_request,
        "already_there": published.already_there,
        "unread": published.unread,
        "nbytes": published.publication.nbytes,
        "nbytes_to_send": published.nbytes_to_send,
        "new": list(published.changes.new),
        "changed": list(published.changes.changed),
        "unchanged": list(published.changes.unchanged),
        "removed": list(published.changes.removed),
        "others": list(published.changes.others),
        "license_concern": published.card.concern,
        "note": None if published.card.note is None else spelled(published.card.note, as_flag),
        "card": published.card.text,
    }


def _show(published: Published) -> None:
    if published.card.note is not None:
        echo(f"Note: {spelled(published.card.note, as_flag)}", err=True)
    if published.card.concern is not None:
        echo(f"Warning: {published.card.concern}", err=True)
    where = published.repository + ("" if published.revision == "main" else f" ({published.revision})")
    if published.commit is None:
        _show_plan(published)
        if published.unread is not None:
            echo(f"Note: {where} was not read, so every file is shown as new: {published.unread}", err=True)
        at_most = "" if published.unread is None else "at most "
        echo(f"{where}: {at_most}{format_nbytes(published.nbytes_to_send)} would be uploaded")
        return
    if published.changes.others:
        echo(f"Note: {where} also holds files that are not in the artifact: {some(published.changes.others)}", err=True)
    if published.already_there:
        echo(f"{where}: already holds the same bytes; nothing was uploaded")
    else:
        sent = len(published.changes.sent)
        echo(f"{where}: {sent} files, {format_nbytes(published.nbytes_to_send)} uploaded")
    echo(f"commit {published.commit}" + (f", {published.pull_request}" if published.pull_request else ""))


def _show_plan(published: Published) -> None:
    files = published.publication.files
    rows: list[tuple[str, ...]] = [("action", "file", "bytes")]
    for action, names in (
        ("add", published.changes.new),
        ("replace", published.changes.changed),
        ("keep", published.changes.unchanged),
    ):
        rows += [(action, name, f"{files[name].nbytes:,}") for name in names]
    rows += [("remove", name, "") for name in published.changes.removed]
    echo_layout(format_table(rows, right=(2,)))
    echo()
    echo_layout(published.card.text)
