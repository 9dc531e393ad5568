"""`qformat verify OWNER/NAME`: checks an artifact on the Hub and prints the result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from qformat.cli.display import echo, echo_findings, echo_json, verdict
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from qformat.artifact.reading.verify import Finding
    from qformat.hub.remote_verify import RemoteReport


def verify_repository(repository: str, *, revision: str | None, public_key: Path | None, as_json: bool) -> bool:
    """Check an artifact on the Hub and print the result.

    Args:
        repository: Name of the repository, `owner/name`.
        revision: Branch, tag or commit, the main branch if None.
        public_key: Key to check the signature with. Not checked if None.
        as_json: Print one JSON object.

    Returns:
        Whether the check passed.
    """
    from qformat.hub.remote_verify import verify_remote

    started = time.monotonic()
    report = verify_remote(repository, revision=revision, public_key=public_key)
    seconds = time.monotonic() - started
    if as_json:
        echo_json({**_facts(report), "seconds": round(seconds, 3)})
    else:
        _show(report, seconds)
    return report.passed


def _facts(report: RemoteReport) -> dict[str, object]:
    return {
        "repository": report.repository,
        "commit": report.commit,
        "passed": report.passed,
        "findings": [_finding(one) for one in report.findings],
        "notices": [_finding(one) for one in report.notices],
        "n_files": report.n_files,
        "nbytes": report.nbytes,
        "nbytes_read": report.nbytes_read,
        "signed": report.signed,
        "signature_checked": report.signature_checked,
        "others": list(report.others),
    }


def _finding(one: Finding) -> dict[str, object]:
    return {"reason": one.reason.value, "file": one.file, "tensor": one.tensor, "message": one.message}


def _show(report: RemoteReport, seconds: float) -> None:
    echo(
        f"{report.repository}@{report.commit[:12]}: {report.n_files} files, {format_nbytes(report.nbytes)}; manifest, "
        f"file sizes, SHA-256 that the Hub lists, headers and small files checked in {seconds:.1f} s, "
        f"{format_nbytes(report.nbytes_read)} downloaded"
    )
    if report.signature_checked:
        echo("signature: valid for this key and these files")
    elif report.signed:
        echo("signature: present but not checked; give the publisher's key with --public-key")
    for notice in report.notices:
        echo(f"notice: {notice.message}")
    echo_findings((finding.reason, finding.message) for finding in report.findings)
    echo(verdict(len(report.findings)))
