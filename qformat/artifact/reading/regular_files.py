"""Open files of a folder that somebody else made: plain names, regular files, nothing outside (spec section 2.3)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qformat.errors import InvalidFileError, Reason

MAX_FILE_NAME_NBYTES = 255
"""What file systems take."""

_RESERVED = {"", ".", ".."}


def check_plain_name(name: str, *, path: Path | str, error: type[InvalidFileError]) -> None:
    """Refuse a file name, taken from inside the file `path`, that is not a plain name in the same folder."""
    plain = name not in _RESERVED and "/" not in name and "\\" not in name and name.isprintable()
    if not plain or len(name.encode("utf-8")) > MAX_FILE_NAME_NBYTES:
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise error(Reason.PATH_ESCAPES, path, f"{shown!r} is not the plain name of a file in the same folder")


@contextmanager
def open_regular(folder: Path, name: str, *, error: type[InvalidFileError]) -> Iterator[int]:
    """Open `folder/name` for reading and yield its file descriptor.

    Only a regular file is opened. A symbolic link is followed only where the Hub's cache makes one: from
    `REPO/snapshots/REVISION/` into `REPO/blobs/`. Raises `error`: missing_file, not_a_regular_file, path_escapes.
    """
    path = folder / name
    check_plain_name(name, path=path, error=error)
    try:
        opened = _hub_blob(path, error) if path.is_symlink() else path
        # O_NONBLOCK: opening a FIFO must not wait for a writer; fstat refuses it afterwards.
        descriptor = os.open(opened, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise error(Reason.MISSING_FILE, path, "there is no such file") from None
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
    """Return the bytes of a regular file of at most `max_nbytes`. Raises `error` (also json_limit when larger)."""
    with open_regular(folder, name, error=error) as descriptor:
        nbytes = os.fstat(descriptor).st_size
        if nbytes > max_nbytes:
            raise error(Reason.JSON_LIMIT, folder / name, f"{nbytes} bytes, at most {max_nbytes} are read")
        data = bytearray(nbytes)
        read_exactly(descriptor, 0, memoryview(data), path=folder / name, error=error)
        return bytes(data)


def read_exactly(
    descriptor: int, offset: int, out: memoryview, *, path: Path | str, error: type[InvalidFileError]
) -> None:
    """Fill `out` from `offset`.

    Raises `error`: truncated where the file ends early, unreadable where the disk does not give its bytes.
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
                next_step="Check the disk that holds it",
            ) from None
        if count == 0:
            raise error(
                Reason.TRUNCATED,
                path,
                f"ends at byte {offset + done}, expected {len(out) - done} bytes more",
                next_step="Fetch the file again",
            )
        done += count


def read_chunks(
    descriptor: int, start: int, stop: int, *, chunk_nbytes: int, path: Path | str, error: type[InvalidFileError]
) -> Iterator[tuple[int, memoryview]]:
    """Yield (position, bytes) of the file's bytes [start, stop) in order, in scratch memory that is used again.

    Raises `error` (truncated, unreadable).
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
    raise error(Reason.PATH_ESCAPES, path, f"is a link to {target}; only the Hub cache's own links are followed")
