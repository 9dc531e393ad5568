"""Files of a published artifact: the files of the local artifact, the model card, the manifest and a signature.

The local artifact is not modified. The published manifest additionally lists the model card, so that the manifest of a
fetched artifact covers every file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import FileRecord, Manifest
from qformat.artifact.reading.file_roles import accompanies
from qformat.artifact.reading.manifest_parser import parse
from qformat.artifact.reading.regular_files import read_if_regular, read_small
from qformat.artifact.writing.manifest_edits import with_files
from qformat.errors import ArtifactError
from qformat.hub.reading.repository import RemoteFile, git_blob_oid
from qformat.named_files import read_named
from qformat.names import CARD_NAME, MANIFEST_NAME, SIGNATURE_NAME


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """File to publish.

    Attributes:
        name: Name in the repository.
        nbytes: Size in bytes.
        sha256: SHA-256 of the content.
        content: Path of a local file, or the content itself.
    """

    name: str
    nbytes: int
    sha256: str
    content: Path | bytes

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> PublishedFile:
        """Return a file with the given content.

        Args:
            name: Name in the repository.
            data: Content.
        """
        return cls(name, len(data), hashlib.sha256(data).hexdigest(), data)

    def is_like(self, remote: RemoteFile | None) -> bool:
        """Return whether a file of the repository has the same content."""
        if remote is None or remote.nbytes != self.nbytes:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        data = self.content if isinstance(self.content, bytes) else read_named(self.content, max_nbytes=self.nbytes)
        return git_blob_oid(data) == remote.oid


@dataclass(frozen=True, slots=True)
class Publication:
    """Files of a published artifact.

    Attributes:
        files: Files by name.
        manifest: Manifest that is published.
    """

    files: Mapping[str, PublishedFile]
    manifest: Manifest

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 per name of every file that a signature covers."""
        return {name: file.sha256 for name, file in self.files.items() if name != SIGNATURE_NAME}

    @property
    def title(self) -> str:
        """Title of the commit. The same content gives the same title."""
        return f"Publish a qformat artifact, manifest {self.files[MANIFEST_NAME].sha256[:16]}"

    def signed(self, signature: bytes) -> Publication:
        """Return a copy of the publication with a signature."""
        return Publication(
            {**self.files, SIGNATURE_NAME: PublishedFile.of_bytes(SIGNATURE_NAME, signature)}, self.manifest
        )


def prepare(artifact: Path, card: str) -> Publication:
    """Return the files to publish.

    Args:
        artifact: Directory of the artifact.
        card: Text of the model card.

    Raises:
        ArtifactError: The manifest is damaged.
    """
    path = artifact / MANIFEST_NAME
    local = read_small(artifact, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    readme = PublishedFile.of_bytes(CARD_NAME, card.encode("utf-8"))
    records = _renewed_records(artifact, parse(local, path))
    data = with_files(local, path, {**records, CARD_NAME: FileRecord(readme.nbytes, readme.sha256)})
    manifest = parse(data, path)
    files = {
        name: readme if name == CARD_NAME else PublishedFile(name, record.nbytes, record.sha256, artifact / name)
        for name, record in manifest.files.items()
    }
    return Publication({**files, MANIFEST_NAME: PublishedFile.of_bytes(MANIFEST_NAME, data)}, manifest)


def _renewed_records(artifact: Path, manifest: Manifest) -> dict[str, FileRecord | None]:
    """Return the present entries of the files that only accompany the model, None for those that do not exist."""
    found: dict[str, FileRecord | None] = {}
    for name, record in manifest.files.items():
        if accompanies(name, record):
            data = read_if_regular(artifact, name)
            found[name] = None if data is None else FileRecord.of(data)
    return found
