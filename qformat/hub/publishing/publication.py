"""What a published artifact consists of: the artifact's files, the model card, a manifest that lists it, a signature.

The local artifact stays as it is. The published manifest differs from the local one in one line, the card's digest,
so that whoever fetches the repository has an artifact whose every file is accounted for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact import manifest as manifests
from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import FileRecord, Manifest
from qformat.artifact.reading.regular_files import read_small
from qformat.errors import ArtifactError
from qformat.hub.reading.repository import RemoteFile, git_blob_oid
from qformat.names import CARD_NAME, MANIFEST_NAME, SIGNATURE_NAME


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file as it is to be in the repository."""

    name: str
    nbytes: int
    sha256: str
    content: Path | bytes

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> PublishedFile:
        """Make a file of bytes in memory."""
        return cls(name, len(data), hashlib.sha256(data).hexdigest(), data)

    def is_like(self, remote: RemoteFile | None) -> bool:
        """Whether the repository has these very bytes under this name already."""
        if remote is None or remote.nbytes != self.nbytes:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return git_blob_oid(data) == remote.oid


@dataclass(frozen=True, slots=True)
class Publication:
    """The files of a published artifact, by name, and its manifest."""

    files: Mapping[str, PublishedFile]
    manifest: Manifest

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file that a signature covers, by name."""
        return {name: file.sha256 for name, file in self.files.items() if name != SIGNATURE_NAME}

    @property
    def title(self) -> str:
        """The message of the commit: the same for the same bytes."""
        return f"Publish a qformat artifact, manifest {self.files[MANIFEST_NAME].sha256[:16]}"

    def signed(self, signature: bytes) -> Publication:
        """Return the publication with a signature beside its manifest."""
        return Publication(
            {**self.files, SIGNATURE_NAME: PublishedFile.of_bytes(SIGNATURE_NAME, signature)}, self.manifest
        )


def prepare(artifact: Path, card: str) -> Publication:
    """Put an artifact and a model card together. Raises ArtifactError for a manifest that is damaged."""
    path = artifact / MANIFEST_NAME
    local = read_small(artifact, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    readme = PublishedFile.of_bytes(CARD_NAME, card.encode("utf-8"))
    data = manifests.with_file(local, path, CARD_NAME, FileRecord(readme.nbytes, readme.sha256))
    manifest = manifests.parse(data, path)
    files = {
        name: readme if name == CARD_NAME else PublishedFile(name, record.nbytes, record.sha256, artifact / name)
        for name, record in manifest.files.items()
    }
    return Publication({**files, MANIFEST_NAME: PublishedFile.of_bytes(MANIFEST_NAME, data)}, manifest)
