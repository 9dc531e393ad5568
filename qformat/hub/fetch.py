"""`qformat fetch`: downloads an artifact from the Hub atomically and resumes an interrupted download."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.artifact.reading.verify import Finding
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.output_kind import ARTIFACT, check_target
from qformat.artifact.writing.staging import Staging, begun_with, refuse_full_disk, work_folder
from qformat.errors import ArtifactError, Reason
from qformat.hub.fetch_run import FetchRun
from qformat.hub.reading.listing import (
    PublishedArtifact,
    listing_findings,
    listing_notices,
    read_published,
)
from qformat.hub.reading.remote import DEFAULT_REVISION, open_repository
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer


@dataclass(frozen=True, slots=True)
class FetchSummary:
    """Result of `fetch`.

    Attributes:
        out: Directory of the artifact.
        repository: Repository that it was fetched from.
        commit: Commit of that repository.
        n_files: Number of files, including the manifest but not the signature.
        nbytes: Size of these files in bytes.
        nbytes_fetched: Bytes that this run downloaded.
        seconds: Duration of this run.
        signed: The artifact has a signature.
        others: Files of the repository that do not belong to the artifact and were not fetched.
        notices: Files that only accompany the model and differ from the manifest (spec section 2.5). They were fetched
            as they are in the repository.
        already_complete: An earlier run had fetched everything.
    """

    out: Path
    repository: str
    commit: str
    n_files: int
    nbytes: int
    nbytes_fetched: int
    seconds: float
    signed: bool
    others: tuple[str, ...]
    notices: tuple[Finding, ...]
    already_complete: bool


def fetch(
    repository: str,
    out: Path | str,
    *,
    revision: str | None = None,
    force: bool = False,
    restart: bool = False,
    token: str | bool | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
    disk: Disk | None = None,
    on_plan: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> FetchSummary:
    """Download an artifact from the Hub and check every byte. `out` appears only when it is complete.

    Args:
        repository: Name of the repository, `owner/name`.
        out: Directory to create.
        revision: Branch, tag or commit. The default is the main branch. An interrupted fetch resumes with the commit
            that it started with.
        force: Replace an existing artifact.
        restart: Discard what an interrupted run has downloaded.
        token: Token for the Hub. None uses the stored token, False sends none.
        transfer: Sizes and retries of requests.
        disk: Access to the disk, for tests.
        on_plan: Called once with the number of bytes of all files.
        on_progress: Called with the number of bytes that arrived, or were already there, since the last call.

    Returns:
        What was fetched.

    Raises:
        ArtifactError: The repository has no artifact, or its files do not match its manifest.
        HubError: The repository cannot be read.
        TargetError: `out` cannot be written.
        UsageError: The name of the repository or the revision is invalid.
    """
    started = time.monotonic()
    out, disk = Path(out), disk or Disk()
    revision = revision or DEFAULT_REVISION
    asked: dict[str, str] = {"repository": repository, "revision": revision}
    begun = {} if restart else begun_with(out)
    continuing = os.path.lexists(work_folder(out))
    if not continuing:
        check_target(out, replace=force, kind=ARTIFACT)
    same = asked.items() <= begun.items()
    published = _find_artifact(repository, str(begun["commit"]) if same else revision, token, transfer)
    disk.needed_nbytes = published.nbytes
    if not continuing:
        refuse_full_disk(out, disk.needed_nbytes, disk)
    on_plan(published.nbytes - len(published.manifest_bytes))
    note: JsonObject = {**asked, "commit": published.repository.commit}
    fingerprint = _fingerprint(published)
    with Staging.begin(out, fingerprint, disk=disk, replace=force, restart=restart, note=note) as staging:
        complete, n_fetched, notices = staging.sealed_before, 0, _listed_notices(published)
        if not complete:
            refuse_full_disk(out, disk.needed_nbytes, disk)
            run = FetchRun(published, staging, transfer, on_progress)
            n_fetched, notices = run.run(), run.notices
    return FetchSummary(
        out=out,
        repository=repository,
        commit=published.repository.commit,
        n_files=published.n_files,
        nbytes=published.nbytes,
        nbytes_fetched=n_fetched,
        seconds=time.monotonic() - started,
        signed=published.signed,
        others=published.others,
        notices=notices,
        already_complete=complete,
    )


def _find_artifact(repository: str, revision: str, token: str | bool | None, transfer: Transfer) -> PublishedArtifact:
    """Read the manifest of a repository and check that the listing matches it."""
    opened = open_repository(repository, revision=revision, token=token, transfer=transfer, error=ArtifactError)
    published = read_published(opened)
    for finding in listing_findings(published):
        if finding.reason is not Reason.EXTRA_FILE:  # files that the manifest does not list are not fetched
            raise finding.as_error(published.where)
    return published


def _listed_notices(published: PublishedArtifact) -> tuple[Finding, ...]:
    """Return the notices about files that the manifest lists. Additional files are not fetched."""
    return tuple(one for one in listing_notices(published) if one.reason is not Reason.EXTRA_FILE)


def _fingerprint(published: PublishedArtifact) -> str:
    digest = hashlib.sha256(published.manifest_bytes).hexdigest()
    return f"fetch {published.repository.name} {published.repository.commit} {digest}"
