"""Opens files that the user, or qformat itself, named: regular files only, and whole ones only up to a limit.

A FIFO or a device could give bytes for ever, and a file of any size would be read into memory. Every problem is an
OSError whose `strerror` says what it is, so that a caller handles it like a missing permission. Files that another file
names are opened by `qformat.artifact.reading.regular_files`, which follows no links.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

MAX_OPTION_FILE_NBYTES = 2**20
"""Largest file that an option names (a recipe, settings, a key), in bytes."""


def open_named(path: Path) -> BufferedReader:
    """Open a regular file for reading. Links are followed.

    Raises:
        OSError: The file cannot be opened, or is not a regular file.
    """
    # With O_NONBLOCK, opening a FIFO does not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device. Write it to a file first", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_named(path: Path, *, max_nbytes: int) -> bytes:
    """Return the bytes of a small regular file.

    Args:
        path: Path of the file.
        max_nbytes: Largest size of the file in bytes.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is too large (EFBIG).
    """
    with open_named(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        data = b"" if nbytes > max_nbytes else file.read(max_nbytes + 1)
    if max(nbytes, len(data)) > max_nbytes:
        found = max(nbytes, len(data))
        raise OSError(errno.EFBIG, f"it has {found:,} bytes, and the limit is {max_nbytes:,}", str(path))
    return data
