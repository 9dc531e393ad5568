"""An artifact in a repository of the Hub: its manifest, and what the listing of the commit says beside it.

The Hub names the SHA-256 of every file in large-file storage, so that a manifest can be compared with a repository
without fetching one shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import Manifest, parse
from qformat.artifact.reading.verify import Finding
from qformat.errors import ArtifactError, Reason
from qformat.hub.reading.repository import Repository
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME

_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class PublishedArtifact:
    """A repository at one commit and the manifest of the artifact in it, with its bytes."""

    repository: Repository
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def where(self) -> Path:
        """The repository and its commit, as messages name it."""
        return Path(f"{self.repository.name}@{self.repository.commit[:12]}")

    @property
    def signed(self) -> bool:
        """Whether a signature lies beside the manifest."""
        return SIGNATURE_NAME in self.repository.files


def read_published(repository: Repository) -> PublishedArtifact:
    """Fetch the manifest of the artifact in a repository, checked against the commit's digest and its own.

    Raises: ArtifactError, also where the repository holds no artifact; HubError.
    """
    where = Path(f"{repository.name}@{repository.commit[:12]}")
    if MANIFEST_NAME not in repository.files:
        raise ArtifactError(
            Reason.MISSING_FILE,
            where / MANIFEST_NAME,
            "there is no such file: the repository holds no qformat artifact",
            next_step=f"To make one of a 16-bit checkpoint: qformat convert {repository.name} OUT",
        )
    data = repository.read_small(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
    return PublishedArtifact(repository, parse(data, where / MANIFEST_NAME), data)


def listing_findings(published: PublishedArtifact) -> Iterator[Finding]:
    """Yield where the listing of the commit contradicts the manifest: missing, other sizes, other SHA-256, more shards.

    A file outside of large-file storage is known to the Hub by another digest, and is not compared here.
    """
    files = published.repository.files
    for name, record in published.manifest.files.items():
        path = published.where / name
        if name not in files:
            yield Finding(Reason.MISSING_FILE, name, f"{path}: there is no such file in the repository")
        elif files[name].nbytes != record.nbytes:
            message = f"{path}: {files[name].nbytes} bytes, expected {record.nbytes}"
            yield Finding(Reason.FILE_SIZE, name, message)
        elif files[name].sha256 not in {None, record.sha256}:
            message = f"{path}: is another file: SHA-256 {files[name].sha256}, expected {record.sha256}"
            yield Finding(Reason.FILE_DIGEST, name, message)
    for name in files:
        if "/" not in name and name.endswith(_WEIGHTS) and name not in published.manifest.files:
            message = f"{published.where / name}: is not in the manifest, and some readers would take it for a shard"
            yield Finding(Reason.EXTRA_FILE, name, message)
