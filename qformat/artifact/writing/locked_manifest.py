"""Exclusive access to the manifest of an existing artifact, for programs that replace it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import FileRecord
from qformat.artifact.reading.regular_files import read_if_regular, read_small
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.manifest_edits import with_files
from qformat.errors import ArtifactError, TargetError
from qformat.names import MANIFEST_NAME


@contextmanager
def locked_manifest(path: Path) -> Iterator[bytes]:
    """Lock the directory of an artifact against other writers and yield the bytes of its manifest.

    Args:
        path: Directory of the artifact.

    Raises:
        ArtifactError: The manifest cannot be read.
        TargetError: The manifest is a link into the Hub's cache, or another process holds the lock.
    """
    target = path / MANIFEST_NAME
    if target.is_symlink():
        raise TargetError(f"{target}: is a link into the Hub's cache. Copy the artifact to another directory first")
    with locked_folder(path):
        yield read_small(path, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Lock a directory against other writers. The lock ends with the process.

    Args:
        path: Existing directory.

    Raises:
        TargetError: The directory cannot be opened, or another process holds the lock.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as problem:
        raise TargetError(f"{path}: cannot be opened: {problem.strerror}") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TargetError(f"{path}: another process is writing to it. Try again") from None
        yield
    finally:
        os.close(folder)


def list_file(path: Path, name: str, *, disk: Disk | None = None) -> None:
    """List a file in the manifest of the artifact in a directory. Nothing happens if one of the two does not exist.

    Args:
        path: Directory of the artifact.
        name: Name of the file, which is not a shard.
        disk: File system operations.

    Raises:
        ArtifactError: The manifest is invalid.
        TargetError: The manifest cannot be written.
    """
    data, target = read_if_regular(path, name), path / MANIFEST_NAME
    if data is None or not target.is_file():
        return
    record = FileRecord.of(data)
    with locked_manifest(path) as manifest:
        (disk or Disk()).replace_file(target, with_files(manifest, target, {name: record}))
