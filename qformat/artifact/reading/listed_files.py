"""Comparison of an artifact's files with the manifest: sizes, SHA-256 of small files, headers (spec section 7.3).

Opening an artifact does this for every file of the model. Only the data of the shards is left to a verification.
"""

from __future__ import annotations

import os
from pathlib import Path

from qformat.artifact import header
from qformat.artifact.digests import sha256_of_file, xxh3
from qformat.artifact.header import Header
from qformat.artifact.limits import max_nbytes_of
from qformat.artifact.manifest import FileRecord
from qformat.artifact.reading.file_roles import can_be_accepted
from qformat.artifact.reading.regular_files import read_exactly
from qformat.artifact.sources.stand_ins import stand_in_of
from qformat.errors import ArtifactError, Reason

HEADER = "header"
"""Component that a finding about the header of a shard names."""


def check_size(descriptor: int, path: Path, record: FileRecord) -> None:
    """Check the size of a file.

    Args:
        descriptor: File descriptor.
        path: Path of the file, for error messages.
        record: Entry of the file in the manifest.

    Raises:
        ArtifactError: The size differs from the manifest (file_size).
    """
    found = os.fstat(descriptor).st_size
    if found != record.nbytes:
        raise size_error(path, found, record.nbytes)


def check_small_file(descriptor: int, path: Path, record: FileRecord) -> None:
    """Compare the size and the SHA-256 of a file that is not a shard. A file larger than its limit is not read.

    Args:
        descriptor: File descriptor.
        path: Path of the file, for error messages.
        record: Entry of the file in the manifest.

    Raises:
        ArtifactError: The file is too large, cannot be read or differs from the manifest (json_limit, file_size,
            file_digest).
    """
    check_size(descriptor, path, record)
    if record.nbytes > (limit := max_nbytes_of(path.name)):
        raise ArtifactError(Reason.JSON_LIMIT, path, f"the file has {record.nbytes} bytes (the limit is {limit})")
    compare_sha256(descriptor, path, record)


def compare_sha256(descriptor: int, path: Path, record: FileRecord) -> None:
    """Compare the SHA-256 of a file that has the size in the manifest.

    Args:
        descriptor: File descriptor.
        path: Path of the file, for error messages.
        record: Entry of the file in the manifest.

    Raises:
        ArtifactError: The file cannot be read or differs from the manifest (file_digest).
    """
    found = sha256_of_file(descriptor, record.nbytes, path=path, error=ArtifactError)
    if found != record.sha256:
        problem = f"was changed: SHA-256 {found}, expected {record.sha256}"
        raise ArtifactError(Reason.FILE_DIGEST, path, problem, next_step=next_step_for(path))


def read_header(descriptor: int, path: Path, expected: str | None) -> Header:
    """Read the header of a shard, compare its digest and parse it.

    Args:
        descriptor: File descriptor.
        path: Path of the shard, for error messages.
        expected: XXH3-128 of the header in the manifest, None to compare nothing.

    Raises:
        ArtifactError: The header is damaged (file_digest) or invalid (spec section 3.1).
    """

    def read_into(offset: int, out: memoryview) -> None:
        read_exactly(descriptor, offset, out, path=path, error=ArtifactError)

    nbytes = os.fstat(descriptor).st_size
    text = header.read_text(read_into, file_nbytes=nbytes, path=path, error=ArtifactError)
    if expected is not None and (found := xxh3(whole := header.framed(text))) != expected:
        error = ArtifactError(
            Reason.FILE_DIGEST,
            path,
            f"{HEADER} (bytes 0 to {len(whole)}) was changed: XXH3-128 {found}, expected {expected}",
            next_step="Fetch the file again",
        )
        error.field = HEADER
        raise error
    return header.parse(text, file_nbytes=nbytes, path=path, error=ArtifactError)


def size_error(path: Path, found: int, expected: int) -> ArtifactError:
    """Return the error for a file whose size differs from the manifest.

    Args:
        path: Path of the file.
        found: Size of the file in bytes.
        expected: Size in the manifest in bytes.
    """
    problem, next_step = f"the file has {found} bytes, expected {expected}", next_step_for(path)
    if (instead := stand_in_of(path)) is not None:
        problem, next_step = f"{problem}: it {instead.problem}", instead.next_step
    return ArtifactError(Reason.FILE_SIZE, path, problem, next_step=next_step)


def next_step_for(path: Path) -> str:
    """Return what to do about a file that differs from the manifest."""
    if not can_be_accepted(path.name):
        return "Fetch the file again"
    return "Fetch the file again, or accept the change with `qformat seal` if it was made on purpose"
