"""File system operations, through which qformat writes everything: complete writes, fsync and error messages.

Tests replace the primitives (`raw_*`) to inject a fault at every call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from qformat.errors import TargetError, Words
from qformat.names import PARTIAL_SUFFIX

FILE_MODE = 0o644
RUN_AGAIN: Words = ("run the same command again",)
RESUMES: Words = ("run the same command again: it resumes",)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

_Result = TypeVar("_Result")


class Disk:
    """Writes to a file system.

    Every method raises TargetError with the path and the next step if an operation fails; on a full disk also with the
    needed and the free space.

    Args:
        needed_nbytes: Size of the whole output in bytes, 0 if it is not known.
        to_continue: Advice on how to go on after the disk was full or failed, the end of a message.
    """

    def __init__(self, needed_nbytes: int = 0, *, to_continue: Words = RUN_AGAIN) -> None:
        self.needed_nbytes = needed_nbytes
        self.to_continue = to_continue

    def make_folder(self, path: Path) -> None:
        """Create a directory, if it does not exist."""
        self._call(path, lambda: self.raw_mkdir(path))

    def make_folders(self, path: Path) -> None:
        """Create a directory and its missing parents."""
        for folder in reversed([path, *path.parents]):
            if not os.path.isdir(folder):
                self.make_folder(folder)

    def open_for_writing(self, path: Path, *, append: bool = False) -> int:
        """Open a file for reading and writing, and create it if it does not exist.

        Args:
            path: Path of the file.
            append: Write at the end of the file.

        Returns:
            A file descriptor.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_APPEND if append else 0)
        return self._call(path, lambda: self.raw_open(path, flags))

    def set_size(self, descriptor: int, nbytes: int, path: Path) -> None:
        """Truncate a file to a size, or extend it with zeros.

        Args:
            descriptor: File descriptor.
            nbytes: New size in bytes.
            path: Path of the file, for error messages.
        """
        self._call(path, lambda: self.raw_truncate(descriptor, nbytes))

    def write_at(self, descriptor: int, data: memoryview, offset: int, path: Path) -> None:
        """Write bytes at an offset, completely.

        Args:
            descriptor: File descriptor.
            data: Bytes to write.
            offset: Offset of the first byte in the file.
            path: Path of the file, for error messages.
        """
        while data:
            count = self._call_write(path, partial(self.raw_pwrite, descriptor, data, offset))
            data = data[count:]
            offset += count

    def append(self, descriptor: int, data: bytes, path: Path) -> None:
        """Write bytes at the end of a file, completely.

        Args:
            descriptor: File descriptor, opened with `append`.
            data: Bytes to write.
            path: Path of the file, for error messages.
        """
        view = memoryview(data)
        while view:
            count = self._call_write(path, partial(self.raw_write, descriptor, view))
            view = view[count:]

    def write_file(self, path: Path, data: bytes | bytearray) -> None:
        """Write and sync a small file.

        Args:
            path: Path of the file. An existing file is overwritten in place.
            data: Contents of the file.
        """
        descriptor = self.open_for_writing(path)
        try:
            self._fill(descriptor, data, path)
        finally:
            os.close(descriptor)

    def replace_file(self, path: Path, data: bytes | bytearray) -> None:
        """Replace the contents of a file atomically: after a crash it has the old or the new ones.

        The new contents are first written next to it under a hidden name, which verification ignores.

        Args:
            path: Path of the file.
            data: New contents of the file.
        """
        with self._unfinished(path) as (descriptor, unfinished):
            try:
                self._fill(descriptor, data, unfinished)
                self.rename(unfinished, path)
            except TargetError:
                with contextlib.suppress(TargetError):
                    self.remove_file(unfinished)
                raise
        self.sync_folder(path.parent)

    def check_can_replace(self, path: Path) -> None:
        """Check that `replace_file` may write a file, before work that takes minutes. Permissions say less to root."""
        with self._unfinished(path) as (_, unfinished):
            self.remove_file(unfinished)

    def replace_folder(self, made: Path, final: Path) -> None:
        """Rename a finished directory to its final name.

        Args:
            made: Finished directory.
            final: Final path. An existing directory is removed first.
        """
        self.remove_folder(final)
        self.rename(made, final)
        self.sync_folder(final.parent)

    def sync(self, descriptor: int, path: Path) -> None:
        """Sync the contents of an open file to the disk.

        Args:
            descriptor: File descriptor.
            path: Path of the file, for error messages.
        """
        self._call(path, lambda: self.raw_fsync(descriptor))

    def sync_file(self, path: Path) -> None:
        """Sync the contents of a closed file to the disk."""
        descriptor = self.open_for_writing(path)
        try:
            self.sync(descriptor, path)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Sync the entries of a directory to the disk."""
        descriptor = self._call(path, lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            self.sync(descriptor, path)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or directory.

        Args:
            old: Current path.
            new: New path.
        """
        self._call(new, lambda: self.raw_rename(old, new))

    def exchange(self, one: Path, other: Path, *, aside: Path) -> None:
        """Exchange two directories atomically. If the file system cannot do that, use two renames.

        Args:
            one: First directory.
            other: Second directory.
            aside: Path to which the second directory moves in the case of two renames.
        """
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
        """Remove a file, if it exists."""
        self._call(path, lambda: self.raw_unlink(path))

    def remove_folder(self, path: Path) -> None:
        """Remove a directory with its contents, if it exists."""
        if not os.path.exists(path):
            return
        for entry in self._call(path, lambda: sorted(path.iterdir())):
            if os.path.isdir(entry) and not os.path.islink(entry):
                self.remove_folder(entry)
            else:
                self.remove_file(entry)
        self._call(path, lambda: self.raw_rmdir(path))

    def remove_empty_folder(self, path: Path) -> None:
        """Remove a directory, unless another process has removed it or has begun to use it."""
        try:
            self._call(path, lambda: self.raw_rmdir(path))
        except TargetError as problem:
            cause = problem.__cause__
            if not isinstance(cause, OSError) or cause.errno not in {errno.ENOENT, errno.ENOTEMPTY}:
                raise

    def free_nbytes(self, path: Path) -> int:
        """Return the free space in bytes on the file system of a path, which need not exist yet."""
        while not os.path.exists(path) and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free

    @contextlib.contextmanager
    def _unfinished(self, path: Path) -> Iterator[tuple[int, Path]]:
        """Open and lock the hidden file in which the new contents of a file are written."""
        unfinished = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
        descriptor = self.open_for_writing(unfinished)
        try:
            if not locked_for_this_process(descriptor, unfinished):
                raise TargetError(f"{path}: another process is writing to it. Wait for it, then ", *self.to_continue)
            yield descriptor, unfinished
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, data: bytes | bytearray, path: Path) -> None:
        self.set_size(descriptor, 0, path)
        self.write_at(descriptor, memoryview(data), 0, path)
        self.sync(descriptor, path)

    def _call(self, path: Path, operation: Callable[[], _Result]) -> _Result:
        try:
            return operation()
        except OSError as problem:
            raise TargetError(*self._explain(path, problem)) from problem

    def _call_write(self, path: Path, operation: Callable[[], int]) -> int:
        nbytes = self._call(path, operation)
        if nbytes == 0:  # another attempt could loop forever
            raise TargetError(
                f"{path}: cannot be written: the file system accepts no more bytes and reports no error. "
                "Check the disk, then ",
                *self.to_continue,
            )
        return nbytes

    def _explain(self, path: Path, problem: OSError) -> Words:
        if problem.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = self.free_nbytes(path)
            needed = f"the output needs {self.needed_nbytes:,} bytes in total, " if self.needed_nbytes else ""
            return (
                f"{path}: not enough disk space: {needed}{free:,} bytes are free. Free some space and ",
                *self.to_continue,
            )
        if problem.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return (f"{path}: cannot be written: {problem.strerror}. Choose a directory with write permission",)
        if problem.errno == errno.EIO:
            return (f"{path}: cannot be written: {problem.strerror}. Check the disk, then ", *self.to_continue)
        return (f"{path}: {problem.strerror}",)

    # Primitives: one system call each.

    def raw_mkdir(self, path: Path) -> None:
        """Create a directory."""
        path.mkdir(exist_ok=True)

    def raw_open(self, path: Path, flags: int) -> int:
        """Open a file.

        Args:
            path: Path of the file.
            flags: Flags of `os.open`.
        """
        return os.open(path, flags, FILE_MODE)

    def raw_truncate(self, descriptor: int, nbytes: int) -> None:
        """Set the size of a file.

        Args:
            descriptor: File descriptor.
            nbytes: New size in bytes.
        """
        os.ftruncate(descriptor, nbytes)

    def raw_pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at an offset and return the number of bytes written, which may be smaller than the data.

        Args:
            descriptor: File descriptor.
            data: Bytes to write.
            offset: Offset of the first byte in the file.
        """
        return os.pwrite(descriptor, data, offset)

    def raw_write(self, descriptor: int, data: memoryview) -> int:
        """Write at the end and return the number of bytes written, which may be smaller than the data.

        Args:
            descriptor: File descriptor.
            data: Bytes to write.
        """
        return os.write(descriptor, data)

    def raw_fsync(self, descriptor: int) -> None:
        """Sync a file to the disk."""
        os.fsync(descriptor)

    def raw_rename(self, old: Path, new: Path) -> None:
        """Rename a file or directory.

        Args:
            old: Current path.
            new: New path.
        """
        old.rename(new)

    def raw_exchange(self, one: Path, other: Path) -> None:
        """Exchange two directories atomically (renameat2 of Linux).

        Args:
            one: First directory.
            other: Second directory.
        """
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
        """Remove an empty directory."""
        path.rmdir()


def locked_for_this_process(descriptor: int, path: Path) -> bool:
    """Lock an open file. The lock ends with the process, or when the file is closed.

    Args:
        descriptor: File descriptor.
        path: Path of the file.

    Returns:
        False if another process holds the lock, or renamed or removed the file before this one had it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine, there = os.fstat(descriptor), path.stat()
    except OSError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def allocated_nbytes(folder: Path) -> int:
    """Return the disk space that the files below a directory occupy, in bytes; 0 if it does not exist."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may be removing it
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total
