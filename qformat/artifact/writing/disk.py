"""Every change that qformat makes to a disk goes through a `Disk`: one place for short writes, fsync and messages.

Tests replace the primitives (`raw_*`) to inject a fault at every single call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from qformat.errors import TargetError
from qformat.names import PARTIAL_SUFFIX

FILE_MODE = 0o644
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

_Result = TypeVar("_Result")


class Disk:
    """Writes to a file system. Raises TargetError naming the path, with needed and free bytes when it is full."""

    def __init__(self, needed_nbytes: int = 0) -> None:
        self.needed_nbytes = needed_nbytes

    def make_folder(self, path: Path) -> None:
        """Create a folder; one that exists is fine."""
        self._call(path, lambda: self.raw_mkdir(path))

    def make_folders(self, path: Path) -> None:
        """Create a folder and those above it that are not there."""
        for folder in reversed([path, *path.parents]):
            if not folder.is_dir():
                self.make_folder(folder)

    def open_for_writing(self, path: Path, *, append: bool = False) -> int:
        """Open a file for reading and writing, creating it if it does not exist."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_APPEND if append else 0)
        return self._call(path, lambda: self.raw_open(path, flags))

    def set_size(self, descriptor: int, nbytes: int, path: Path) -> None:
        """Cut a file to, or extend it with zeros to, a size."""
        self._call(path, lambda: self.raw_truncate(descriptor, nbytes))

    def write_at(self, descriptor: int, data: memoryview, offset: int, path: Path) -> None:
        """Write all of `data` at a byte offset."""
        while data:
            count = self._call_write(path, partial(self.raw_pwrite, descriptor, data, offset))
            data = data[count:]
            offset += count

    def append(self, descriptor: int, data: bytes, path: Path) -> None:
        """Write all of `data` at the end of a file that was opened for appending."""
        view = memoryview(data)
        while view:
            count = self._call_write(path, partial(self.raw_write, descriptor, view))
            view = view[count:]

    def write_file(self, path: Path, data: bytes | bytearray) -> None:
        """Write a whole small file and bring it to the disk."""
        descriptor = self.open_for_writing(path)
        try:
            self.set_size(descriptor, 0, path)
            self.write_at(descriptor, memoryview(data), 0, path)
            self.sync(descriptor, path)
        finally:
            os.close(descriptor)

    def replace_file(self, path: Path, data: bytes | bytearray) -> None:
        """Give a file other bytes in one step: after a crash it has the old ones or the new ones.

        The new bytes are written beside it, under a hidden name, which whoever verifies a folder passes over.
        """
        unfinished = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
        try:
            self.write_file(unfinished, data)
            self.rename(unfinished, path)
        except TargetError:
            with contextlib.suppress(TargetError):
                self.remove_file(unfinished)
            raise
        self.sync_folder(path.parent)

    def replace_folder(self, made: Path, final: Path) -> None:
        """Give a finished folder its name; a folder that has the name is removed first."""
        self.remove_folder(final)
        self.rename(made, final)
        self.sync_folder(final.parent)

    def sync(self, descriptor: int, path: Path) -> None:
        """Bring a file's bytes to the disk."""
        self._call(path, lambda: self.raw_fsync(descriptor))

    def sync_file(self, path: Path) -> None:
        """Bring the bytes of a file that somebody else has written to the disk."""
        descriptor = self.open_for_writing(path)
        try:
            self.sync(descriptor, path)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Bring a folder's entries to the disk."""
        descriptor = self._call(path, lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            self.sync(descriptor, path)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder its new name."""
        self._call(new, lambda: self.raw_rename(old, new))

    def exchange(self, one: Path, other: Path, *, aside: Path) -> None:
        """Exchange two folders in one step; where the file system cannot, move `other` to `aside` first."""
        try:
            self._call(other, lambda: self.raw_exchange(one, other))
        except TargetError as refused:
            cause = refused.__cause__
            if not isinstance(cause, OSError) or cause.errno not in {
                errno.EINVAL,
                errno.ENOSYS,
                errno.ENOTSUP,
            }:
                raise
            self.rename(other, aside)
            self.rename(one, other)

    def remove_file(self, path: Path) -> None:
        """Remove a file; one that does not exist is fine."""
        self._call(path, lambda: self.raw_unlink(path))

    def remove_folder(self, path: Path) -> None:
        """Remove a folder with everything in it; one that does not exist is fine."""
        if not path.exists():
            return
        for entry in sorted(path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                self.remove_folder(entry)
            else:
                self.remove_file(entry)
        self._call(path, lambda: self.raw_rmdir(path))

    def free_nbytes(self, path: Path) -> int:
        """Return the bytes free for us on the file system of the nearest existing folder of a path."""
        while not os.path.exists(path) and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free

    def _call(self, path: Path, operation: Callable[[], _Result]) -> _Result:
        try:
            return operation()
        except OSError as problem:
            raise TargetError(self._explain(path, problem)) from problem

    def _call_write(self, path: Path, operation: Callable[[], int]) -> int:
        nbytes = self._call(path, operation)
        if nbytes == 0:  # asking again could go on for ever
            raise TargetError(f"{path}: the file system takes no more bytes and does not say why")
        return nbytes

    def _explain(self, path: Path, problem: OSError) -> str:
        if problem.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = self.free_nbytes(path)
            needed = f"{self.needed_nbytes:,} bytes are needed in all, " if self.needed_nbytes else ""
            return (
                f"{path}: no space left: {needed}{free:,} bytes are free. "
                "Make room and run the same command again: it continues"
            )
        if problem.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return f"{path}: cannot be written: {problem.strerror}. Choose a folder that you may write to"
        return f"{path}: {problem.strerror}"

    # The primitives, one system call each.

    def raw_mkdir(self, path: Path) -> None:
        """Create a folder."""
        path.mkdir(exist_ok=True)

    def raw_open(self, path: Path, flags: int) -> int:
        """Open a file."""
        return os.open(path, flags, FILE_MODE)

    def raw_truncate(self, descriptor: int, nbytes: int) -> None:
        """Set a file's size."""
        os.ftruncate(descriptor, nbytes)

    def raw_pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at an offset; may write less than asked."""
        return os.pwrite(descriptor, data, offset)

    def raw_write(self, descriptor: int, data: memoryview) -> int:
        """Write at the end; may write less than asked."""
        return os.write(descriptor, data)

    def raw_fsync(self, descriptor: int) -> None:
        """Bring to the disk."""
        os.fsync(descriptor)

    def raw_rename(self, old: Path, new: Path) -> None:
        """Rename."""
        old.rename(new)

    def raw_exchange(self, one: Path, other: Path) -> None:
        """Exchange two names atomically (Linux: renameat2)."""
        if sys.platform != "linux":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "renameat2"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def raw_unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink(missing_ok=True)

    def raw_rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


def allocated_nbytes(folder: Path) -> int:
    """Return the bytes that the files below a folder take on the disk, holes left out; 0 where there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may be clearing it away
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total
