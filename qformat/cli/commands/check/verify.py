"""`qformat verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.checks.verified import verified
from qformat.cli.checks.verify_remote import verify_repository
from qformat.cli.display import echo, echo_findings, echo_json, echo_layout, format_table, verdict
from qformat.cli.options import (
    json_option,
    options_record,
    refuse_report_in,
    report_option,
    revision_option,
    workers_option,
)
from qformat.errors import UsageError
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.artifact.verification_facts import ComparisonFacts, ErrorFacts
    from qformat.converters.compare.verification import Verification

EXIT_FINDING = 1


@dataclass(frozen=True, slots=True)
class VerifyArguments:
    """Arguments of `qformat verify`, under the names of the options."""

    location: str
    source: str | None
    report: Path | None
    sha256: bool
    signature: bool
    public_key: Path | None
    revision: str | None
    workers: int | None
    as_json: bool


@click.command(
    epilog="""\b
Examples:
  qformat verify SmolLM2-135M-Instruct-nf4
  qformat verify SmolLM2-135M-Instruct-nf4 --source SmolLM2-135M-Instruct \\
      --report quality.html
  qformat verify owner/model-nf4 --signature --public-key owner.pub"""
)
@click.argument("location", metavar="ART")
@click.option("--source", metavar="SRC", help="Compare with the source checkpoint of ART, a folder or owner/name.")
@report_option
@click.option("--sha256", is_flag=True,
              help="Also check the SHA-256 of every shard, the digest that the Hub and `sha256sum` use.")  # fmt: skip
@click.option("--signature", is_flag=True,
              help="Require a signature and check it. Needs --public-key.")  # fmt: skip
@click.option("--public-key", metavar="KEY.pub", type=click.Path(path_type=Path),
              help="Public key of the publisher (PEM).")  # fmt: skip
@revision_option("Branch, tag or commit if ART is a Hub repository.  [default: main]")
@workers_option()
@json_option()
@options_record(VerifyArguments)
def command(options: VerifyArguments) -> None:
    """Check an artifact's integrity and measure its error against the source.

    ART is the folder of an artifact. Its structure and the digest of every byte are checked. With --source, every
    weight is also encoded again and compared byte for byte, every kept tensor is compared bit for bit, and the error
    of the decoded weights is measured.

    ART may also be a Hub repository (owner/name) if no folder has that name. The check then covers the manifest, the
    sizes and SHA-256 that the Hub lists, headers and small files, and downloads no weights.

    The exit code is 1 if a check fails.
    """
    from qformat.converters.sources.open_source import is_repository

    if options.signature and options.public_key is None:
        raise UsageError("--signature: no key to check it with. Give the publisher's key with --public-key KEY.pub")
    passed = _verify_repository(options) if is_repository(options.location) else _verify_folder(options)
    if not passed:
        click.get_current_context().exit(EXIT_FINDING)


def _verify_repository(options: VerifyArguments) -> bool:
    location = options.location
    if options.source is not None or options.report is not None or options.sha256:
        raise UsageError(
            f"{location}: --source, --report and --sha256 need a folder. Download it with `qformat fetch` first"
        )
    return verify_repository(
        location, revision=options.revision, public_key=options.public_key, as_json=options.as_json
    )


def _verify_folder(options: VerifyArguments) -> bool:
    if options.revision is not None:
        raise UsageError(f"{options.location}: is a folder. --revision needs a Hub repository")
    if options.report is not None:
        refuse_report_in(options.report, options.location, *([] if options.source is None else [options.source]))
    if not options.as_json:
        from qformat.artifact.reading.structure import check_directory

        check_directory(Path(options.location))  # an error: there is nothing to show a result about
    found = verified(
        options.location,
        options.source,
        sha256=options.sha256,
        public_key=options.public_key,
        workers=options.workers,
    )
    if options.report is not None:
        from qformat.report.artifact_page import write_html

        write_html(found.to_json(), options.report)
    if options.as_json:
        echo_json(found.to_json())
    else:
        _show(found, options.source, options.report)
    return found.passed


def _show(found: Verification, source: str | None, report: Path | None) -> None:
    facts = found.to_json()
    integrity, comparison = facts["integrity"], facts["comparison"]
    checks = "structure and digests" + (", SHA-256 of every file" if integrity["sha256_checked"] else "")
    checks += ", signature" if integrity["signature_checked"] else ""
    rate = format_nbytes(integrity["nbytes"] / max(found.integrity_s, 1e-9))
    echo(
        f"{facts['path']}: {integrity['n_files']} files, {format_nbytes(integrity['nbytes'])}, {checks} checked in "
        f"{found.integrity_s:.1f} s ({rate}/s): {'intact' if integrity['passed'] else 'DAMAGED'}"
    )
    if comparison is not None:
        _show_comparison(comparison, found.comparison_s)
    elif source is not None:
        echo(f"{source}: not compared, because the artifact cannot be opened")
    for notice in facts["notices"]:
        echo(f"notice: {notice['message']}")
    echo_findings((finding["reason"], finding["message"]) for finding in facts["findings"])
    if report is not None:
        echo(f"report: {report}")
    echo(verdict(len(facts["findings"])))


def _show_comparison(comparison: ComparisonFacts, seconds: float) -> None:
    rate = comparison["overall"]["n_weights"] / max(seconds, 1e-9)
    echo(
        f"{comparison['source']}: {format_nbytes(comparison['source_nbytes'])} compared in {seconds:.1f} s "
        f"({rate / 1e6:,.0f} M weights/s)"
    )
    if comparison["packed"]:
        rows: list[tuple[str, ...]] = [("module", "tensors", "weights", "rel. RMS", "max error", "SNR", "cosine")]
        rows += [_row(kind["kind"], kind["n_tensors"], kind["errors"]) for kind in comparison["by_kind"]]
        rows.append(_row("all", len(comparison["packed"]), comparison["overall"]))
        echo()
        echo_layout(format_table(rows, right=range(1, 7)))
        echo()
    n_encoded, n_kept = comparison["n_packed"] - comparison["n_chosen"], comparison["n_kept"]
    change, n_tuned = comparison["scale_change"], comparison["n_tuned"]
    scales = "codes and scales match the recipe"
    if change is not None:
        scales = f"codes match the recipe, scales within {change:.0%}"
    for meaning, n_passed, n_all in (
        (scales, comparison["n_exact"], n_encoded),
        ("calibrated codes and scales close to the source", comparison["n_near"], comparison["n_chosen"]),
        ("kept tensors identical", comparison["n_identical"], n_kept),
        (
            "source tensors match the manifest's digests",
            comparison["n_source_named"],
            comparison["n_source_digests"],
        ),
    ):
        if n_all:
            echo(f"{meaning}: {n_passed} of {n_all}")
    if n_tuned:
        names = [tensor["name"] for tensor in comparison["kept"] if tensor["tuned"] and tensor["n_wrong_bytes"]]
        more = f" and {n_tuned - 1} more" if n_tuned > 1 else ""
        echo(f"kept tensors tuned, according to the manifest: {names[0]}{more}")


def _row(name: str, n_tensors: int, errors: ErrorFacts) -> tuple[str, ...]:
    def shown(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    return (
        name,
        str(n_tensors),
        f"{errors['n_weights']:,}",
        shown(errors["relative_rms"], ".3%"),
        shown(errors["max_abs_error"], ".4g"),
        shown(errors["snr_db"], ".2f") + " dB",
        shown(errors["cosine"], ".5f"),
    )
