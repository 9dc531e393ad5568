"""An artifact in a repository of the Hub: its manifest, compared with the listing of the commit.

The Hub lists the SHA-256 of every file in large-file storage, so a manifest can be compared with a repository without
downloading the shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import Manifest
from qformat.artifact.reading.file_roles import accompanies
from qformat.artifact.reading.manifest_parser import parse
from qformat.artifact.reading.verify import Finding, notice_of
from qformat.errors import ArtifactError, Reason
from qformat.hub.reading.repository import Repository
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME

_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class PublishedArtifact:
    """An artifact in a repository at one commit.

    Attributes:
        repository: The repository.
        manifest: Manifest of the artifact.
        manifest_bytes: Content of the manifest file.
    """

    repository: Repository
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def where(self) -> Path:
        """Repository and commit, for messages."""
        return Path(f"{self.repository.name}@{self.repository.commit[:12]}")

    @property
    def signed(self) -> bool:
        """Whether the repository has a signature."""
        return SIGNATURE_NAME in self.repository.files

    @property
    def n_files(self) -> int:
        """Number of files of the artifact, including the manifest but not the signature."""
        return len(self.manifest.files) + 1

    @property
    def nbytes(self) -> int:
        """Size of these files in bytes."""
        return sum(record.nbytes for record in self.manifest.files.values()) + len(self.manifest_bytes)

    @property
    def others(self) -> tuple[str, ...]:
        """Files of the repository that do not belong to the artifact, without hidden files."""
        taken = {*self.manifest.files, MANIFEST_NAME, SIGNATURE_NAME}
        return tuple(name for name in self.repository.files if name not in taken and not name.startswith("."))


def read_published(repository: Repository) -> PublishedArtifact:
    """Read the manifest of the artifact in a repository, and check it against its digest and that of the commit.

    Raises:
        ArtifactError: The repository has no artifact (missing_file), or the manifest is invalid.
        HubError: The manifest cannot be downloaded.
    """
    where = Path(f"{repository.name}@{repository.commit[:12]}")
    if MANIFEST_NAME not in repository.files:
        raise ArtifactError(
            Reason.MISSING_FILE,
            where / MANIFEST_NAME,
            "the file does not exist: the repository has no qformat artifact",
            next_step=f"To convert a 16-bit checkpoint: qformat convert {repository.name} OUT",
        )
    data = repository.read_small(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
    return PublishedArtifact(repository, parse(data, where / MANIFEST_NAME), data)


def listing_findings(published: PublishedArtifact) -> tuple[Finding, ...]:
    """Return the contradictions between listing and manifest: missing files, sizes, SHA-256 digests, unlisted entries.

    The Hub does not list the SHA-256 of files outside of large-file storage, so only their sizes are compared.
    """
    return tuple(one for one in _differences(published) if not only_accompanies(published, one.file))


def listing_notices(published: PublishedArtifact) -> tuple[Finding, ...]:
    """Return the differences of files that only accompany the model (spec section 2.5)."""
    found = (one for one in _differences(published) if only_accompanies(published, one.file))
    return tuple(notice_of(one, published.where) for one in found)


def only_accompanies(published: PublishedArtifact, name: str) -> bool:
    """Return whether a file or a directory of the repository only accompanies the model (spec section 2.5).

    Args:
        published: The artifact in the repository.
        name: Name in the top directory.
    """
    return accompanies(name, published.manifest.files.get(name))


def _differences(published: PublishedArtifact) -> Iterator[Finding]:
    files = published.repository.files
    for name, record in published.manifest.files.items():
        path = published.where / name
        if name not in files:
            yield Finding(Reason.MISSING_FILE, name, f"{path}: the file does not exist in the repository")
        elif files[name].nbytes != record.nbytes:
            message = f"{path}: found {files[name].nbytes} bytes, expected {record.nbytes}"
            yield Finding(Reason.FILE_SIZE, name, message)
        elif files[name].sha256 not in {None, record.sha256}:
            message = (
                f"{path}: does not match the manifest: found SHA-256 {files[name].sha256}, expected {record.sha256}"
            )
            yield Finding(Reason.FILE_DIGEST, name, message)
    taken = {*published.manifest.files, MANIFEST_NAME, SIGNATURE_NAME}
    for name in dict.fromkeys(path.partition("/")[0] for path in files):
        if name not in taken and not name.startswith("."):
            why = ", and some readers would load it as a shard" if name.endswith(_WEIGHTS) else ""
            yield Finding(Reason.EXTRA_FILE, name, f"{published.where / name}: is not in the manifest{why}")
