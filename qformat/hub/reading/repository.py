"""Interface of a repository at one commit, which is read from the Hub or from the local cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from qformat.errors import InvalidFileError, Reason

ReadBytes = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """File in the listing of a repository.

    Attributes:
        path: Path in the repository.
        nbytes: Size in bytes.
        oid: Git's blob hash. For a file in large-file storage, it is the hash of the pointer file.
        sha256: SHA-256 of a file in large-file storage, None for other files.
    """

    path: str
    nbytes: int
    oid: str
    sha256: str | None


class Repository(Protocol):
    """A repository at one commit. Implementations are thread-safe."""

    @property
    def name(self) -> str:
        """Name of the repository, `owner/name`."""

    @property
    def commit(self) -> str:
        """Hash of the commit."""

    @property
    def files(self) -> Mapping[str, RemoteFile]:
        """Files of the commit that can be read, by path."""

    def file(self, path: str) -> RemoteFile:
        """Return the file at a path. Raise an error if it does not exist."""

    def read_small(self, path: str, *, max_nbytes: int) -> bytes:
        """Return the content of a file, checked against the digest in the listing.

        Args:
            path: Path in the repository.
            max_nbytes: Largest accepted file in bytes.
        """

    def read_range(self, path: str, start: int, out: memoryview, *, on_bytes: ReadBytes = ...) -> None:
        """Read a range of bytes of a file.

        Args:
            path: Path in the repository.
            start: First byte of the range.
            out: Buffer to fill. Its length is the length of the range.
            on_bytes: Called with the number of bytes that arrived since the last call.
        """

    def close(self) -> None:
        """Release resources and end all waiting."""


def check_digest(data: bytes | bytearray, file: RemoteFile, *, shown: str, error: type[InvalidFileError]) -> None:
    """Check the content of a file against the digest in the listing.

    Args:
        data: Content of the file.
        file: Entry of the file in the listing.
        shown: Name of the file in messages.
        error: Type of the error to raise.

    Raises:
        InvalidFileError: The digest differs (file_digest). The error is of type `error`.
    """
    if file.sha256 is not None:
        found, expected = hashlib.sha256(data).hexdigest(), file.sha256
    else:
        found, expected = git_blob_oid(data), file.oid
    if found != expected:
        raise digest_error(shown, found, expected, error)


def git_blob_oid(data: bytes | bytearray) -> str:
    """Return git's blob hash of a file, which identifies files outside of large-file storage."""
    digest = hashlib.sha1(f"blob {len(data)}\0".encode(), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest()


def digest_error(shown: str, found: str, expected: str, error: type[InvalidFileError]) -> InvalidFileError:
    """Return the error for a file whose content differs from the commit.

    Args:
        shown: Name of the file in messages.
        found: Digest of the content.
        expected: Digest in the listing.
        error: Type of the error.
    """
    return error(
        Reason.FILE_DIGEST,
        shown,
        f"has the digest {found}, expected {expected}: it was changed in transit, on the server or in the cache",
        next_step="Run the same command again, which downloads the file again. If it is in the local cache, "
        "remove it there first (`hf cache verify` finds it)",
    )
