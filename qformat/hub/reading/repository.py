"""What a repository at one commit is to its readers, whether it is read from the Hub or from the local cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from qformat.errors import InvalidFileError, Reason

ReadBytes = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a listing. sha256: of a file in large-file storage; of another, git's blob hash is `oid`."""

    path: str
    nbytes: int
    oid: str
    sha256: str | None


class Repository(Protocol):
    """A repository at one commit. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """The name, `owner/name`."""

    @property
    def commit(self) -> str:
        """The commit's hash."""

    @property
    def files(self) -> Mapping[str, RemoteFile]:
        """Every file of the commit that can be read here, by path."""

    def file(self, path: str) -> RemoteFile:
        """Return a file of that path, or say that there is none."""

    def read_small(self, path: str, *, max_nbytes: int) -> bytes:
        """Return the bytes of a file, checked against the digest that the commit has for it."""

    def read_range(self, path: str, start: int, out: memoryview, *, on_bytes: ReadBytes = ...) -> None:
        """Fill `out` with the file's bytes from `start` on; `on_bytes` is told of them as they arrive."""

    def close(self) -> None:
        """Stop waiting for anything."""


def check_digest(data: bytes | bytearray, file: RemoteFile, *, shown: str, error: type[InvalidFileError]) -> None:
    """Compare the bytes of a whole file with what its commit says. Raises `error` (file_digest)."""
    if file.sha256 is not None:
        found, expected = hashlib.sha256(data).hexdigest(), file.sha256
    else:
        found, expected = git_blob_oid(data), file.oid
    if found != expected:
        raise digest_error(shown, found, expected, error)


def git_blob_oid(data: bytes | bytearray) -> str:
    """Return git's hash of a file's bytes, by which the Hub names files outside of large-file storage."""
    digest = hashlib.sha1(f"blob {len(data)}\0".encode(), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest()


def digest_error(shown: str, found: str, expected: str, error: type[InvalidFileError]) -> InvalidFileError:
    """Return the error for a file that has other bytes than its commit has."""
    return error(
        Reason.FILE_DIGEST,
        shown,
        f"has the digest {found}, expected {expected}: bytes were changed on the way, on the server or in the cache",
        next_step="Run the same command again, which reads the file anew; if it lies in the local cache, "
        "remove it there first (`hf cache verify` finds it)",
    )
