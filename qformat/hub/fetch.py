"""The verb `fetch`: an artifact from the Hub, whole or not at all: its manifest, its pieces, the seal."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.staging import Staging, begun_with, check_target, refuse_full_disk, work_folder
from qformat.errors import ArtifactError, Reason
from qformat.hub.fetch_run import FetchRun
from qformat.hub.reading.listing import listing_findings, read_published
from qformat.hub.reading.remote import DEFAULT_REVISION, open_repository
from qformat.hub.reading.stream import CONNECTIONS
from qformat.hub.reading.transport import Patience
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME


@dataclass(frozen=True, slots=True)
class FetchSummary:
    """What a fetch did. nbytes: of the artifact. nbytes_fetched: by this run. others: files that were left there."""

    out: Path
    repository: str
    commit: str
    n_files: int
    nbytes: int
    nbytes_fetched: int
    seconds: float
    signed: bool
    others: tuple[str, ...]
    already_complete: bool


def fetch(
    repository: str,
    out: Path | str,
    *,
    revision: str | None = None,
    force: bool = False,
    restart: bool = False,
    connections: int = CONNECTIONS,
    token: str | bool | None = None,
    patience: Patience | None = None,
    disk: Disk | None = None,
    on_plan: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> FetchSummary:
    """Download the artifact in a repository of the Hub; every byte is checked, and `out` appears when it is whole.

    revision: branch, tag or commit; an interrupted fetch goes on with the commit that it began with. force: replace
    an artifact of that name. restart: drop what an interrupted run left. on_plan: told of all bytes; on_progress: of
    bytes that are there.
    Raises: ArtifactError for a repository that holds no artifact, or not the one of its manifest; HubError;
    TargetError; UsageError.
    """
    started = time.monotonic()
    out, disk = Path(out), disk or Disk()
    revision = revision or DEFAULT_REVISION
    begun = {} if restart else begun_with(out)
    same = (begun.get("repository"), begun.get("revision")) == (repository, revision)
    continuing = os.path.lexists(work_folder(out))
    if not continuing:
        check_target(out, replace=force)
    opened = open_repository(
        repository,
        revision=str(begun["commit"]) if same else revision,
        token=token,
        patience=patience,
        error=ArtifactError,
    )
    published = read_published(opened)
    for finding in listing_findings(published):
        if finding.reason is not Reason.EXTRA_FILE:  # what the manifest does not list is not fetched
            raise finding.as_error(published.where)
    total = sum(record.nbytes for record in published.manifest.files.values())
    disk.needed_nbytes = total + len(published.manifest_bytes)
    if not continuing:
        refuse_full_disk(out, disk.needed_nbytes)
    on_plan(total)
    fingerprint = f"fetch {repository} {opened.commit} {hashlib.sha256(published.manifest_bytes).hexdigest()}"
    note = {"repository": repository, "revision": revision, "commit": opened.commit}
    with Staging.begin(out, fingerprint, disk=disk, replace=force, restart=restart, note={**note}) as staging:
        complete, n_fetched = staging.sealed_before, 0
        if not complete:
            refuse_full_disk(out, disk.needed_nbytes)
            n_fetched = FetchRun(published, staging, connections, on_progress).run()
    taken = {*published.manifest.files, MANIFEST_NAME, SIGNATURE_NAME}
    return FetchSummary(
        out=out,
        repository=repository,
        commit=opened.commit,
        n_files=len(published.manifest.files) + 1,
        nbytes=total + len(published.manifest_bytes),
        nbytes_fetched=n_fetched,
        seconds=time.monotonic() - started,
        signed=published.signed,
        others=tuple(name for name in opened.files if name not in taken and not name.startswith(".")),
        already_complete=complete,
    )
