"""`qformat verify`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat import strict_json
from qformat.cli.display import format_table, progress_bar
from qformat.cli.verify_remote import verify_repository
from qformat.errors import InvalidFileError, TargetError, UsageError
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.artifact.reading.verify import Finding, IntegrityReport
    from qformat.codec.cpu.error_sums import ErrorSums
    from qformat.converters.compare.comparison import Comparison, KeptComparison, PackedComparison
    from qformat.converters.sources.source import Source
    from qformat.report.facts import (
        ComparisonFacts,
        ErrorFacts,
        FindingFacts,
        KeptFacts,
        ManifestFacts,
        PackedFacts,
        VerificationFacts,
    )

EXIT_FINDING = 1


@click.command(
    epilog="""\b
Examples:
  qformat verify SmolLM2-135M-Instruct-nf4
  qformat verify SmolLM2-135M-Instruct-nf4 --source SmolLM2-135M-Instruct --report quality.html
  qformat verify owner/SmolLM2-135M-Instruct-nf4 --signature --public-key owner.pub"""
)
@click.argument("location", metavar="ART")
@click.option("--source", metavar="SRC", help="The checkpoint that ART was made from: a folder, or owner/name.")
@click.option("--report", metavar="FILE.html", type=click.Path(path_type=Path), help="Write a page that opens offline.")
@click.option("--sha256", is_flag=True, help="Also take the SHA-256 of every shard, as Hub and `sha256sum` do.")
@click.option(
    "--signature", is_flag=True, help="Check the signature, too; it must be there, and --public-key tells whose."
)
@click.option("--public-key", metavar="KEY.pub", type=click.Path(path_type=Path), help="The publisher's key (PEM).")
@click.option("--revision", help="Branch, tag or commit, if ART is a repository of the Hub.  [default: main]")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    location: str,
    source: str | None,
    report: Path | None,
    sha256: bool,
    signature: bool,
    public_key: Path | None,
    revision: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Prove that the artifact in folder ART is whole: its structure and the digest of every byte.

    ART may be a repository of the Hub (owner/name), if no folder has that name: its manifest, the sizes and SHA-256
    that the Hub lists, headers and small files are checked, and no weights are fetched.

    With --source, also encode every weight again and compare the bytes, compare every kept tensor bit for bit, and
    measure how far what a reader computes with is from SRC. Exits with 1 if anything is wrong.
    """
    from qformat.converters.sources.open_source import is_repository, open_source
    from qformat.cores import usable_cores

    if signature and public_key is None:
        raise UsageError("--signature: give the publisher's key with --public-key KEY.pub")
    if is_repository(location):
        if source is not None or report is not None or sha256:
            raise UsageError(f"{location}: --source, --report and --sha256 are for a folder: `qformat fetch` it first")
        if not verify_repository(location, revision=revision, public_key=public_key, as_json=as_json):
            ctx.exit(EXIT_FINDING)
        return
    if revision is not None:
        raise UsageError(f"{location}: is no repository of the Hub, and --revision is for those")
    artifact = Path(location)
    if report is not None:
        _refuse_unwritable(report, artifact, source)
    workers = workers or usable_cores()
    with ExitStack() as stack:
        opened = None
        if source is not None:
            opened = open_source(source, revision=_recorded_commit(artifact, source))
            stack.callback(opened.close)
        started = time.monotonic()
        integrity = _check(artifact, sha256=sha256 or public_key is not None, workers=workers)
        if public_key is not None:
            integrity = _with_signature(integrity, public_key)
        checked = time.monotonic()
        comparison = _compare(artifact, opened, integrity, workers) if opened is not None else None
        compared = time.monotonic()
    facts = _facts(integrity, comparison, signature_checked=public_key is not None)
    if report is not None:
        _write(facts, report)
    if as_json:
        seconds = {"integrity": round(checked - started, 3), "comparison": round(compared - checked, 3)}
        click.echo(strict_json.dumps({**facts, "seconds": seconds}, indent=2))
    else:
        _show(facts, source, report, integrity_seconds=checked - started, comparison_seconds=compared - checked)
    if not facts["good"]:
        ctx.exit(EXIT_FINDING)


def verification_facts(artifact: Path, source: str, *, workers: int) -> VerificationFacts:
    """Verify an artifact, compare it with its source, and return what `--json` prints. Raises SourceError."""
    from qformat.converters.sources.open_source import open_source

    with ExitStack() as stack:
        opened = open_source(source, revision=_recorded_commit(artifact, source))
        stack.callback(opened.close)
        integrity = _check(artifact, sha256=False, workers=workers)
        comparison = _compare(artifact, opened, integrity, workers)
        return _facts(integrity, comparison, signature_checked=False)


def _recorded_commit(artifact: Path, source: str) -> str | None:
    """Return the commit of a repository that the artifact was made from, if it was made from that repository."""
    from qformat.artifact.reading.structure import read_manifest
    from qformat.converters.sources.open_source import is_repository

    if not is_repository(source):
        return None
    try:
        recorded = read_manifest(artifact).source
    except InvalidFileError:  # the check of the artifact tells what is wrong with it
        return None
    commit = recorded.get("commit")
    return commit if recorded.get("repository") == source and isinstance(commit, str) else None


def _refuse_unwritable(report: Path, artifact: Path, source: str | None) -> None:
    """Refuse what would fail after minutes of work, or spoil what is verified."""
    folder = report.absolute().parent
    if report.is_dir():
        raise UsageError(f"--report {report}: is a folder, expected the name of a file")
    if not folder.is_dir():
        raise UsageError(f"--report {report}: there is no folder {folder}")
    for checked in (artifact, *([] if source is None else [Path(source)])):
        if folder.resolve().is_relative_to(checked.resolve()):
            raise UsageError(
                f"--report {report}: lies inside {checked}, which must stay as it is. Choose another folder"
            )


def _check(artifact: Path, *, sha256: bool, workers: int) -> IntegrityReport:
    from qformat.artifact.reading.structure import read_manifest
    from qformat.artifact.reading.verify import verify_integrity
    from qformat.errors import ArtifactError

    try:
        files = read_manifest(artifact).files
    except ArtifactError:
        files = {}  # verify_integrity tells why
    total = sum(record.nbytes for record in files.values() if record.header_xxh3 is not None)
    with progress_bar(total, "Checking digests") as update:
        return verify_integrity(artifact, sha256=sha256, workers=workers, on_progress=update)


def _with_signature(integrity: IntegrityReport, public_key: Path) -> IntegrityReport:
    """Return the report with what is wrong with the signature, if anything is."""
    from qformat.artifact.reading.verify import finding_of
    from qformat.errors import ArtifactError
    from qformat.hub.signature import check_local_signature

    try:
        check_local_signature(integrity.path, public_key)
    except ArtifactError as error:
        return replace(integrity, findings=(*integrity.findings, finding_of(error)))
    return integrity


def _compare(artifact: Path, source: Source, integrity: IntegrityReport, workers: int) -> Comparison | None:
    """Compare, unless the artifact is too damaged to be opened: the integrity report has told why."""
    from qformat.converters.compare.compare import compare
    from qformat.errors import ArtifactError

    total = sum(tensor.nbytes for tensor in source.tensors.values())
    total += sum(part.nbytes for weight in source.packed.values() for part in weight.parts.values())
    try:
        with progress_bar(total, "Comparing with the source") as update:
            return compare(
                artifact,
                source,
                workers=workers,
                on_progress=update,
                on_compile=lambda: click.echo("Compiling kernels, once on this machine ...", err=True),
            )
    except ArtifactError:
        if integrity.good:
            raise
        return None


def _write(facts: VerificationFacts, report: Path) -> None:
    from qformat.report.artifact_page import write_html

    try:
        write_html(facts, report)
    except OSError as error:
        raise TargetError(f"--report {report}: {error.strerror}") from error


def _facts(integrity: IntegrityReport, comparison: Comparison | None, *, signature_checked: bool) -> VerificationFacts:
    findings = [*integrity.findings, *(comparison.findings if comparison is not None else ())]
    return {
        "path": str(integrity.path),
        "good": not findings,
        "findings": [_finding_facts(finding) for finding in findings],
        "integrity": {
            "good": integrity.good,
            "n_files": integrity.n_files,
            "nbytes": integrity.nbytes,
            "sha256_checked": integrity.sha256_checked,
            "signature_checked": signature_checked,
        },
        "manifest": _manifest_facts(integrity.path),
        "comparison": _comparison_facts(comparison) if comparison is not None else None,
    }


def _finding_facts(finding: Finding) -> FindingFacts:
    return {
        "reason": finding.reason.value,
        "file": finding.file,
        "tensor": finding.tensor,
        "component": finding.component,
        "message": finding.message,
    }


def _manifest_facts(artifact: Path) -> ManifestFacts | None:
    from qformat.artifact.reading.structure import read_manifest
    from qformat.errors import ArtifactError

    try:
        manifest = read_manifest(artifact)
    except ArtifactError:
        return None
    return {
        "format_version": manifest.format_version,
        "generator": manifest.generator,
        "source": manifest.source,
        "recipe": manifest.recipe,
        "files": {name: {"nbytes": record.nbytes, "sha256": record.sha256} for name, record in manifest.files.items()},
    }


def _comparison_facts(comparison: Comparison) -> ComparisonFacts:
    from qformat.codec.cpu.error_sums import add_up

    return {
        "source": str(comparison.source),
        "source_nbytes": comparison.source_nbytes,
        "bits_per_weight": comparison.bits_per_weight,
        "bits_per_parameter": comparison.bits_per_parameter,
        "overall": _error_facts(comparison.overall),
        "code_counts": list(comparison.code_counts),
        "n_packed": comparison.n_packed,
        "n_exact": comparison.n_exact,
        "n_chosen": comparison.n_chosen,
        "n_near": comparison.n_near,
        "n_kept": comparison.n_kept,
        "n_identical": comparison.n_identical,
        "n_tuned": len(comparison.tuned),
        "scale_change": comparison.scale_change,
        "n_source_digests": comparison.n_source_digests,
        "n_source_named": comparison.n_source_named,
        "by_kind": [
            {
                "kind": kind,
                "n_tensors": len(tensors),
                "errors": _error_facts(add_up(tensor.errors for tensor in tensors)),
            }
            for kind, tensors in comparison.by_kind().items()
        ],
        "packed": [_packed_facts(tensor) for tensor in comparison.packed],
        "kept": [_kept_facts(tensor) for tensor in comparison.kept],
    }


def _packed_facts(tensor: PackedComparison) -> PackedFacts:
    from qformat.converters.compare.comparison import kind_of, layer_of

    return {
        "name": tensor.name,
        "kind": kind_of(tensor.name),
        "layer": layer_of(tensor.name),
        "dtype": tensor.layout.float_format.value,
        "shape": list(tensor.layout.shape),
        "block_size": tensor.layout.block_size,
        "double_quant": tensor.layout.double_quant,
        "source_nbytes": tensor.source_nbytes,
        "nbytes": tensor.nbytes,
        "errors": _error_facts(tensor.errors),
        "code_counts": list(tensor.code_counts),
        "n_wrong_codes": tensor.n_wrong_codes,
        "n_wrong_scales": tensor.n_wrong_scales,
        "n_far_scales": tensor.n_far_scales,
        "source_named": tensor.source_named,
    }


def _kept_facts(tensor: KeptComparison) -> KeptFacts:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "reason": tensor.keep_reason,
        "nbytes": tensor.nbytes,
        "n_wrong_bytes": tensor.n_wrong_bytes,
        "source_named": tensor.source_named,
        "tuned": tensor.tuned,
    }


def _error_facts(errors: ErrorSums) -> ErrorFacts:
    return {
        "n_weights": errors.n_weights,
        "relative_rms": errors.relative_rms,
        "snr_db": errors.snr_db,
        "max_abs_error": errors.max_abs_error,
        "cosine": errors.cosine,
    }


def _show(
    facts: VerificationFacts,
    source: str | None,
    report: Path | None,
    *,
    integrity_seconds: float,
    comparison_seconds: float,
) -> None:
    integrity, comparison = facts["integrity"], facts["comparison"]
    checks = "structure and digests" + (", SHA-256 of every file" if integrity["sha256_checked"] else "")
    checks += ", signature" if integrity["signature_checked"] else ""
    rate = format_nbytes(integrity["nbytes"] / max(integrity_seconds, 1e-9))
    click.echo(
        f"{facts['path']}: {integrity['n_files']} files, {format_nbytes(integrity['nbytes'])}, {checks} checked in "
        f"{integrity_seconds:.1f} s ({rate}/s): {'whole' if integrity['good'] else 'DAMAGED'}"
    )
    if comparison is not None:
        _show_comparison(comparison, comparison_seconds)
    elif source is not None:
        click.echo(f"{source}: not compared: the artifact cannot be opened")
    for finding in facts["findings"]:
        click.echo(f"{finding['reason']}: {finding['message']}")
    if report is not None:
        click.echo(f"report: {report}")
    n_findings = len(facts["findings"])
    click.echo("good" if facts["good"] else f"NOT GOOD: {n_findings} finding{'s' if n_findings != 1 else ''}")


def _show_comparison(comparison: ComparisonFacts, seconds: float) -> None:
    rate = comparison["overall"]["n_weights"] / max(seconds, 1e-9)
    click.echo(
        f"{comparison['source']}: {format_nbytes(comparison['source_nbytes'])} compared in {seconds:.1f} s "
        f"({rate / 1e6:,.0f} M weights/s)"
    )
    if comparison["packed"]:
        rows: list[tuple[str, ...]] = [("module", "tensors", "weights", "rel. RMS", "max error", "SNR", "cosine")]
        rows += [_row(kind["kind"], kind["n_tensors"], kind["errors"]) for kind in comparison["by_kind"]]
        rows.append(_row("all", len(comparison["packed"]), comparison["overall"]))
        click.echo()
        click.echo(format_table(rows, right=range(1, 7)))
        click.echo()
    n_encoded, n_kept = comparison["n_packed"] - comparison["n_chosen"], comparison["n_kept"]
    change, n_tuned = comparison["scale_change"], comparison["n_tuned"]
    scales = "codes and scales" if change is None else f"codes, and scales within {change:.0%},"
    for meaning, n_good, n_all in (
        (f"{scales} as the recipe gives", comparison["n_exact"], n_encoded),
        ("codes and scales chosen on a text, and near the source", comparison["n_near"], comparison["n_chosen"]),
        ("kept tensors identical", comparison["n_identical"], n_kept),
        ("source tensors as the manifest names", comparison["n_source_named"], comparison["n_source_digests"]),
    ):
        if n_all:
            click.echo(f"{meaning}: {n_good} of {n_all}")
    if n_tuned:
        names = [tensor["name"] for tensor in comparison["kept"] if tensor["tuned"] and tensor["n_wrong_bytes"]]
        more = f" and {n_tuned - 1} others" if n_tuned > 1 else ""
        click.echo(f"kept tensors tuned, as the manifest says: {names[0]}{more}")


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
