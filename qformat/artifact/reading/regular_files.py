"""Safe opening of files in an untrusted directory: plain names and regular files only (spec sections 2.2 and 2.3)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qformat.errors import ArtifactError, InvalidFileError, Reason

MAX_FILE_NAME_NBYTES = 255
"""Longest file name of common file systems, in bytes."""

_RESERVED = {"", ".", ".."}
_FETCH_LINKED = "Fetch the linked file with the tool that made the link (git annex get, dvc pull), or copy it here"


def check_plain_name(name: str, *, path: Path | str, error: type[InvalidFileError]) -> None:
    """Check that a name from the contents of a file is the plain name of a file in the same directory.

    Args:
        name: Name to check.
        path: File that contains the name, for error messages.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The name is not plain (path_escapes). The class is `error`.
    """
    plain = name not in _RESERVED and "/" not in name and "\\" not in name and name.isprintable()
    if not plain or len(name.encode("utf-8")) > MAX_FILE_NAME_NBYTES:
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise error(Reason.PATH_ESCAPES, path, f"{shown!r} is not the plain name of a file in the same directory")


@contextmanager
def open_regular(
    folder: Path, name: str, *, error: type[InvalidFileError], follow_links: bool = False
) -> Iterator[int]:
    """Open a regular file for reading and yield its file descriptor.

    A symbolic link is followed only inside the Hub's cache, from `REPO/snapshots/REVISION/` into `REPO/blobs/`, unless
    `follow_links` is set.

    Args:
        folder: Directory of the file.
        name: Name of the file.
        error: Class of the error to raise.
        follow_links: Whether a symbolic link to any regular file is followed.

    Raises:
        InvalidFileError: The file cannot be opened (missing_file, not_a_regular_file, path_escapes). The class is
            `error`.
    """
    path = folder / name
    check_plain_name(name, path=path, error=error)
    try:
        opened = _hub_blob(path, error) if not follow_links and path.is_symlink() else path
        # With O_NONBLOCK, opening a FIFO does not wait for a writer. The check of its type follows below.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
        descriptor = os.open(opened, flags)
    except FileNotFoundError:
        if not path.is_symlink():
            raise error(Reason.MISSING_FILE, path, "does not exist") from None
        problem = f"is a symbolic link to {os.readlink(path)}, which does not exist"
        raise error(Reason.MISSING_FILE, path, problem, next_step=_FETCH_LINKED) from None
    except OSError as problem:
        reason = Reason.NOT_A_REGULAR_FILE if problem.errno in {errno.ELOOP, errno.ENXIO} else Reason.MISSING_FILE
        raise error(reason, path, f"cannot be opened: {problem.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise error(Reason.NOT_A_REGULAR_FILE, path, "is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_small(folder: Path, name: str, *, max_nbytes: int, error: type[InvalidFileError]) -> bytes:
    """Return the bytes of a small regular file.

    Args:
        folder: Directory of the file.
        name: Name of the file.
        max_nbytes: Largest size of the file in bytes.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The file cannot be opened or read, or is too large (json_limit). The class is `error`.
    """
    with open_regular(folder, name, error=error) as descriptor:
        return read_whole(descriptor, folder / name, max_nbytes=max_nbytes, error=error)


def read_whole(descriptor: int, path: Path, *, max_nbytes: int, error: type[InvalidFileError]) -> bytes:
    """Return the bytes of a small file that is open.

    Args:
        descriptor: File descriptor.
        path: Path of the file, for error messages.
        max_nbytes: Largest size of the file in bytes.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The file cannot be read or is too large (json_limit). The class is `error`.
    """
    nbytes = os.fstat(descriptor).st_size
    if nbytes > max_nbytes:
        raise error(Reason.JSON_LIMIT, path, f"the file has {nbytes} bytes (the limit is {max_nbytes})")
    data = bytearray(nbytes)
    read_exactly(descriptor, 0, memoryview(data), path=path, error=error)
    return bytes(data)


def read_if_regular(folder: Path, name: str) -> bytes | None:
    """Return the bytes of a file, None if it does not exist, cannot be read or is not a regular file.

    Args:
        folder: Directory of the file.
        name: Name of the file.
    """
    try:
        with open_regular(folder, name, error=ArtifactError) as descriptor:
            data = bytearray(os.fstat(descriptor).st_size)
            read_exactly(descriptor, 0, memoryview(data), path=folder / name, error=ArtifactError)
            return bytes(data)
    except ArtifactError:
        return None


def read_exactly(
    descriptor: int, offset: int, out: memoryview, *, path: Path | str, error: type[InvalidFileError]
) -> None:
    """Fill a buffer with bytes of an open file.

    Args:
        descriptor: File descriptor.
        offset: Offset of the first byte in the file.
        out: Buffer to fill.
        path: Path of the file, for error messages.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The file ends too early (truncated), or the disk reports an error (unreadable). The class is
            `error`.
    """
    done = 0
    while done < len(out):
        try:
            count = os.preadv(descriptor, [out[done:]], offset + done)
        except OSError as problem:
            raise error(
                Reason.UNREADABLE,
                path,
                f"cannot be read at byte {offset + done}: {problem.strerror}",
                next_step="Check the disk",
            ) from None
        if count == 0:
            raise error(
                Reason.TRUNCATED,
                path,
                f"ends at byte {offset + done}, expected {len(out) - done} more bytes",
                next_step="Fetch the file again",
            )
        done += count


def read_chunks(
    descriptor: int, start: int, stop: int, *, chunk_nbytes: int, path: Path | str, error: type[InvalidFileError]
) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of a range in order, as pairs of offset and bytes. The buffer is reused for every pair.

    Args:
        descriptor: File descriptor.
        start: Offset of the first byte.
        stop: Offset after the last byte.
        chunk_nbytes: Number of bytes to read at a time.
        path: Path of the file, for error messages.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The range cannot be read (truncated, unreadable). The class is `error`.
    """
    buffer = memoryview(bytearray(min(chunk_nbytes, max(stop - start, 0))))
    for position in range(start, stop, chunk_nbytes):
        part = buffer[: min(chunk_nbytes, stop - position)]
        read_exactly(descriptor, position, part, path=path, error=error)
        yield position, part


def _hub_blob(path: Path, error: type[InvalidFileError]) -> Path:
    snapshots = path.parent.parent
    target = path.parent / os.readlink(path)
    resolved = Path(os.path.realpath(target))
    if snapshots.name == "snapshots" and resolved.parent == Path(os.path.realpath(snapshots.parent / "blobs")):
        return resolved
    raise error(
        Reason.PATH_ESCAPES, path, f"is a symbolic link to {target}, but only links inside the Hub's cache are followed"
    )
