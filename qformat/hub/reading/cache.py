"""The local cache of huggingface_hub, read as a repository without any request.

    HF_HUB_CACHE/models--owner--name/refs/main              hash of a commit
                                     snapshots/COMMIT/FILE  symbolic link to the blob
                                     blobs/DIGEST           the content, under the digest that the Hub lists

huggingface_hub does not check what it downloads. Readers compare the content with the digest in the blob's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from qformat.artifact.digests import sha256_of_file
from qformat.artifact.reading.regular_files import open_regular, read_exactly
from qformat.artifact.writing.disk import Disk
from qformat.errors import InvalidFileError, Option, Reason, SourceError
from qformat.hub.names import check_repository_name, check_revision, is_commit
from qformat.hub.reading.repository import ReadBytes, RemoteFile, check_digest, digest_error

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_REF_NBYTES = 100


class CachedRepository:
    """A snapshot in the local cache, with the files in its top directory.

    Args:
        name: Name of the repository, `owner/name`.
        commit: Hash of the commit.
        folder: Directory of the snapshot.
        error: Type of the errors about files.
    """

    def __init__(self, name: str, commit: str, folder: Path, *, error: type[InvalidFileError]) -> None:
        self.name = name
        self.commit = commit
        self.folder = folder
        self._error = error
        self._open_files = ExitStack()
        self._descriptors: dict[str, int] = {}
        self.files: dict[str, RemoteFile] = {}
        try:
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if not entry.is_dir():
                    self.files[entry.name] = self._open(entry.name)
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return str(self.folder)

    def read_small(self, path: str, *, max_nbytes: int) -> bytes:
        """Return the content of a file, checked against the digest in its blob's name.

        Args:
            path: Name of the file.
            max_nbytes: Largest accepted file in bytes.

        Raises:
            InvalidFileError: The file does not exist (missing_file), is too large (json_limit), or has another digest
                (file_digest).
        """
        file = self.file(path)
        if file.nbytes > max_nbytes:
            raise self._error(
                Reason.JSON_LIMIT,
                self.folder / path,
                f"the file has {file.nbytes} bytes, at most {max_nbytes} are allowed",
            )
        data = bytearray(file.nbytes)
        self.read_range(path, 0, memoryview(data))
        check_digest(data, file, shown=str(self.folder / path), error=self._error)
        return bytes(data)

    def read_range(self, path: str, start: int, out: memoryview, *, on_bytes: ReadBytes = lambda nbytes: None) -> None:
        """Read a range of bytes of a file.

        Args:
            path: Name of the file.
            start: First byte of the range.
            out: Buffer to fill. Its length is the length of the range.
            on_bytes: Called once with the number of bytes.

        Raises:
            InvalidFileError: The file does not exist (missing_file) or is too short (truncated).
        """
        read_exactly(self._descriptors[self.file(path).path], start, out, path=self.folder / path, error=self._error)
        on_bytes(len(out))

    def check(self, paths: Iterable[str]) -> None:
        """Compare files with their digests. It is for files that are not hashed during the conversion.

        Raises:
            InvalidFileError: A digest differs (file_digest).
        """
        for path in paths:
            file, shown = self.file(path), self.folder / path
            if file.sha256 is None:
                self.read_small(path, max_nbytes=file.nbytes)
                continue
            found = sha256_of_file(self._descriptors[path], file.nbytes, path=shown, error=self._error)
            if found != file.sha256:
                raise digest_error(str(shown), found, file.sha256, self._error)

    def close(self) -> None:
        """Close all files."""
        self._open_files.close()

    def file(self, path: str) -> RemoteFile:
        """Return the entry of a file.

        Raises:
            InvalidFileError: The file is not in the cache (missing_file).
        """
        if path not in self.files:
            raise self._error(
                Reason.MISSING_FILE, self.folder / path, "is not in the local cache",
                next_step=("To download it, leave out ", Option("offline"), ", or unset HF_HUB_OFFLINE"),
            )  # fmt: skip
        return self.files[path]

    def _open(self, name: str) -> RemoteFile:
        path = self.folder / name
        digest = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
        if not _DIGEST.fullmatch(digest):
            raise self._error(
                Reason.NOT_A_REGULAR_FILE, path, "is not a symbolic link to a blob of the cache",
                next_step="If the directory is a checkpoint of your own, specify its path as the source",
            )  # fmt: skip
        descriptor = self._open_files.enter_context(open_regular(self.folder, name, error=self._error))
        self._descriptors[name] = descriptor
        sha256 = digest if len(digest) == 64 else None
        return RemoteFile(name, os.fstat(descriptor).st_size, "" if sha256 else digest, sha256)


def find_in_cache(name: str, revision: str, *, error: type[InvalidFileError] = SourceError) -> CachedRepository | None:
    """Return the snapshot of a repository in the local cache, or None if the cache does not have it.

    Args:
        name: Name of the repository, `owner/name`.
        revision: Branch, tag or commit. The cache records the commits of branches and tags.
        error: Type of the errors about files.

    Raises:
        UsageError: The name of the repository or the revision is invalid.
        InvalidFileError: The snapshot has files that huggingface_hub did not create. The error is of type `error`.
    """
    folder = _folder(check_repository_name(name))
    commit = revision if is_commit(check_revision(revision)) else _read_ref(folder / "refs" / revision)
    if commit is None or not (folder / "snapshots" / commit).is_dir():
        return None
    return CachedRepository(name, commit, folder / "snapshots" / commit, error=error)


def note_ref(name: str, revision: str, commit: str) -> None:
    """Record the commit of a branch or tag in the cache, as huggingface_hub does when it downloads by name.

    Args:
        name: Name of the repository, `owner/name`.
        revision: Branch or tag. A commit hash is not recorded.
        commit: Hash of the commit.

    Raises:
        TargetError: The cache cannot be written.
    """
    if not is_commit(revision):
        disk, path = Disk(), _folder(name) / "refs" / check_revision(revision)
        for folder in reversed([parent for parent in path.parents if not parent.exists()]):
            disk.make_folder(folder)
        disk.write_file(path, commit.encode("ascii"))


def _folder(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _read_ref(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_REF_NBYTES).decode("ascii", "replace").strip()
    except OSError:
        return None
    return text if is_commit(text) else None
