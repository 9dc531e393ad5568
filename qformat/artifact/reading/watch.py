"""Detection of changes to mapped files before a computation uses them.

A mapping shows later changes to its file. If another process writes in place, the new bytes appear in the model; if it
truncates the file, access to the mapping kills the process (SIGBUS). The specification forbids both (section 2.4:
files are replaced by renaming, never changed in place). The size and the modification time reveal such a change.
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
    """State of mapped files at the time of mapping. Copies and pickles are empty, because they map no files."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[mmap.mmap, _Seen]] = {}

    def add(self, path: Path, mapped: mmap.mmap, status: os.stat_result) -> None:
        """Watch a file.

        Args:
            path: Path of the file.
            mapped: Mapping of the file.
            status: Status of the descriptor, taken before it was mapped.
        """
        self._files[path] = (mapped, _Seen.of(status))

    def check(self) -> None:
        """Check that no file was truncated or written to since it was mapped.

        A file that was replaced or removed passes, because the mapping keeps the old file.

        Raises:
            ArtifactError: A file was changed (file_size, file_digest).
        """
        for path, (mapped, seen) in self._files.items():
            if (nbytes := mapped.size()) != seen.nbytes:  # size of the mapped file, even if its path was reused
                raise _changed(
                    path, Reason.FILE_SIZE, f"the file has {nbytes} bytes, but had {seen.nbytes} when it was mapped"
                )
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
        next_step="The model in memory changed too: load it again, and replace files by renaming, never in place",
    )
