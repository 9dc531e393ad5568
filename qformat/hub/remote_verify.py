"""Verification of an artifact on the Hub without downloading its weights.

    manifest     downloaded; its own digest is checked
    every file   exists and has the size in the manifest; for large files, the SHA-256 that the Hub lists is compared
    small files  downloaded and hashed
    headers      downloaded by byte range, hashed, and compared with manifest and index
    signature    downloaded and checked if a public key is given; then no other file may be there

This trusts the Hub to store the bytes whose SHA-256 it lists. `fetch` checks the bytes themselves.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qformat.artifact import header
from qformat.artifact.digests import xxh3
from qformat.artifact.header import Header
from qformat.artifact.manifest import FileRecord
from qformat.artifact.reading.structure import check_config, check_index, check_tensors
from qformat.artifact.reading.verify import Finding, finding_of, notice_of, signed_differences
from qformat.cores import run_tasks
from qformat.errors import ArtifactError, Reason
from qformat.hub.reading.listing import (
    PublishedArtifact,
    listing_findings,
    listing_notices,
    only_accompanies,
    read_published,
)
from qformat.hub.reading.remote import open_repository
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.hub.signature import check_published_signature
from qformat.names import CONFIG_NAME, INDEX_NAME, SIGNATURE_NAME

MAX_SMALL_NBYTES = 64 * 2**20
"""Largest file outside the shards that is downloaded to be hashed. The Hub lists the SHA-256 of larger files."""


@dataclass(frozen=True, slots=True)
class RemoteReport:
    """Result of `verify_remote`. The verification passed if it has no findings.

    Attributes:
        repository: Repository of the artifact.
        commit: Commit of that repository.
        findings: Every problem that was found.
        notices: Changed, missing and additional files that only accompany the model (spec section 2.5).
        n_files: Number of files, including the manifest but not the signature.
        nbytes: Size of these files in bytes.
        nbytes_read: Bytes that were downloaded.
        signed: The repository has a signature.
        signature_checked: A public key was given and the signature was made with it.
        others: Files of the repository that do not belong to the artifact.
    """

    repository: str
    commit: str
    findings: tuple[Finding, ...]
    n_files: int = 0
    nbytes: int = 0
    nbytes_read: int = 0
    signed: bool = False
    signature_checked: bool = False
    others: tuple[str, ...] = ()
    notices: tuple[Finding, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the verification has no findings."""
        return not self.findings


def verify_remote(
    repository: str,
    *,
    revision: str | None = None,
    public_key: Path | None = None,
    token: str | bool | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
    on_progress: Callable[[int], None] = lambda _: None,
) -> RemoteReport:
    """Verify an artifact on the Hub without downloading its weights. Every problem becomes a finding.

    Args:
        repository: Name of the repository, `owner/name`.
        revision: Branch, tag or commit. The default is the main branch.
        public_key: Public key of the publisher (PEM). If given, a signature by this key must exist, and every file that
            it does not cover is a finding.
        token: Token for the Hub. None uses the stored token, False sends none.
        transfer: Sizes and retries of requests.
        on_progress: Called with the number of bytes downloaded since the last call.

    Raises:
        HubError: The repository cannot be read.
        UsageError: The name of the repository, the revision or the public key is invalid.
    """
    opened = open_repository(repository, revision=revision, token=token, transfer=transfer, error=ArtifactError)
    try:
        published = read_published(opened)
    except ArtifactError as error:
        return RemoteReport(repository, opened.commit, (finding_of(error),))
    check = _Check(published, transfer.connections, on_progress)
    findings, notices = [*listing_findings(published)], [*listing_notices(published)]
    for found in check.files({one.file for one in (*findings, *notices)}):
        if only_accompanies(published, found.file):
            notices.append(notice_of(found, published.where))
        else:
            findings.append(found)
    if not findings:
        findings += check.structure()
    if public_key is not None:
        names = {name.partition("/")[0] for name in opened.files}
        findings += signed_differences(notices, names, published.where)
        notices = []
        findings += check.signature(public_key)
    return RemoteReport(
        repository=repository,
        commit=opened.commit,
        findings=tuple(findings),
        n_files=published.n_files,
        nbytes=published.nbytes,
        nbytes_read=check.nbytes_read + len(published.manifest_bytes),
        signed=published.signed,
        signature_checked=public_key is not None and all(one.file != SIGNATURE_NAME for one in findings),
        others=published.others,
        notices=tuple(notices),
    )


@dataclass(slots=True)
class _Check:
    published: PublishedArtifact
    connections: int
    on_progress: Callable[[int], None]
    nbytes_read: int = 0
    headers: dict[str, Header] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self, without: set[str]) -> list[Finding]:
        """Fetch and check headers and small files in parallel, except for files with known findings."""
        tasks = {name: (name, record) for name, record in self.published.manifest.files.items() if name not in without}
        found = run_tasks(tasks, self._file, workers=self.connections, thread_name="qformat-verify")
        return [finding for finding in found.values() if finding is not None]

    def structure(self) -> list[Finding]:
        """Check that headers, index and config match the manifest."""
        where, manifest = self.published.where, self.published.manifest
        try:
            check_tensors(where, manifest, self.headers)
            for name in (INDEX_NAME, CONFIG_NAME):
                if name not in self.small:
                    raise ArtifactError(Reason.MISSING_FILE, where / name, "the manifest does not list it")
            check_index(self.small[INDEX_NAME], where / INDEX_NAME, self.headers)
            check_config(self.small[CONFIG_NAME], where / CONFIG_NAME, manifest)
        except ArtifactError as error:
            return [finding_of(error)]
        return []

    def signature(self, public_key: Path) -> list[Finding]:
        """Check the signature with the publisher's key."""
        try:
            check_published_signature(self.published, public_key)
        except ArtifactError as error:
            return [finding_of(error)]
        return []

    def _file(self, item: tuple[str, FileRecord]) -> Finding | None:
        name, record = item
        try:
            if record.header_xxh3 is not None:
                self._header(name, record.header_xxh3)
            elif self.published.repository.files[name].sha256 is None or name in {INDEX_NAME, CONFIG_NAME}:
                self._small(name, record)
        except ArtifactError as error:
            return finding_of(error)
        return None

    def _header(self, name: str, expected: str) -> None:
        path, nbytes = self.published.where / name, self.published.repository.files[name].nbytes

        def read_into(offset: int, out: memoryview) -> None:
            self.published.repository.read_range(name, offset, out, on_bytes=self._arrived)

        text = header.read_text(read_into, file_nbytes=nbytes, path=path, error=ArtifactError)
        found = xxh3(header.framed(text))
        if found != expected:
            raise ArtifactError(
                Reason.FILE_DIGEST,
                path,
                f"the header does not match the manifest: found XXH3-128 {found}, expected {expected}",
            )
        self.headers[name] = header.parse(text, file_nbytes=nbytes, path=path, error=ArtifactError)

    def _small(self, name: str, record: FileRecord) -> None:
        data = self.published.repository.read_small(name, max_nbytes=MAX_SMALL_NBYTES)
        self._arrived(len(data))
        found = hashlib.sha256(data).hexdigest()
        if found != record.sha256:
            path = self.published.where / name
            raise ArtifactError(
                Reason.FILE_DIGEST,
                path,
                f"does not match the manifest: found SHA-256 {found}, expected {record.sha256}",
            )
        if name in {INDEX_NAME, CONFIG_NAME}:
            self.small[name] = data

    def _arrived(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes_read += nbytes
        self.on_progress(nbytes)
