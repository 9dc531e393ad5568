"""Mapped files that must stay what they were: a change is noticed before it is computed with, where it can be.

A mapping follows its file. Bytes that another process writes in place appear in the model; where the file was cut,
touching the mapping kills the process (SIGBUS), which no program survives. Both are against the specification (2.4:
files are replaced by renaming, never changed in place), and a look at size and time of change tells before.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qformat.errors import ArtifactError, Reason


@dataclass(frozen=True, slots=True)
class _Seen:
    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Seen:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class MappedFileWatch:
    """What mapped files were when they were mapped. Copies and pickles of a model map no files, and watch nothing."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[mmap.mmap, _Seen]] = {}

    def add(self, path: Path, mapped: mmap.mmap, status: os.stat_result) -> None:
        """Watch a file. status: of the descriptor that was mapped, taken before."""
        self._files[path] = (mapped, _Seen.of(status))

    def check(self) -> None:
        """Raise ArtifactError (file_size, file_digest) for a file that was cut or written to since it was mapped.

        A file that was replaced or removed under its name is no concern: the mapping keeps the old one.
        """
        for path, (mapped, seen) in self._files.items():
            if (nbytes := mapped.size()) != seen.nbytes:  # of the mapped file itself, whatever its name is now
                raise _changed(path, Reason.FILE_SIZE, f"{nbytes} bytes, and {seen.nbytes} when it was mapped")
            try:
                now = _Seen.of(os.stat(path))
            except OSError:
                continue
            if (now.device, now.inode) == (seen.device, seen.inode) and now != seen:
                raise _changed(path, Reason.FILE_DIGEST, "was written to since it was mapped")

    def __bool__(self) -> bool:
        return bool(self._files)

    def __deepcopy__(self, memo: Mapping[int, object]) -> MappedFileWatch:
        return MappedFileWatch()

    def __reduce__(self) -> tuple[type[MappedFileWatch], tuple[()]]:
        return MappedFileWatch, ()


def _changed(path: Path, reason: Reason, problem: str) -> ArtifactError:
    return ArtifactError(
        reason,
        path,
        problem,
        next_step="The model in memory changed with it: load it again, and replace files by renaming, never in place",
    )
