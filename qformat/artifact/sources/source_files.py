"""Safe opening of files in a directory of the user's own, such as the source of a conversion.

The rules of artifacts (spec sections 2.2 and 2.3) protect those who read an artifact of somebody else. A source is the
user's own, so a symbolic link to a regular file is followed. Snapshots in the Hub's cache keep the rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from qformat.artifact.reading.regular_files import open_regular, read_whole
from qformat.artifact.reading.structure import ShardLayout, Structure
from qformat.artifact.sources.stand_ins import HEAD_NBYTES, refuse_stand_in
from qformat.errors import InvalidFileError


@contextmanager
def open_source_file(folder: Path, name: str, *, error: type[InvalidFileError]) -> Iterator[int]:
    """Open a file of a source for reading and yield its file descriptor.

    Args:
        folder: Directory of the file.
        name: Name of the file.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The file cannot be opened (missing_file, not_a_regular_file, path_escapes), or it is a pointer
            or an error page in place of the file (missing_file). The class is `error`.
    """
    with open_regular(folder, name, error=error, follow_links=not _is_snapshot(folder)) as descriptor:
        try:
            head = os.pread(descriptor, HEAD_NBYTES, 0)
        except OSError:
            head = b""  # the problem is reported when the file is read
        refuse_stand_in(name, head, path=folder / name, error=error)
        yield descriptor


def read_source_file(folder: Path, name: str, *, max_nbytes: int, error: type[InvalidFileError]) -> bytes:
    """Return the bytes of a small file of a source.

    Args:
        folder: Directory of the file.
        name: Name of the file.
        max_nbytes: Largest size of the file in bytes.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: See `open_source_file`; or the file cannot be read or is too large (json_limit). The class is
            `error`.
    """
    with open_source_file(folder, name, error=error) as descriptor:
        return read_whole(descriptor, folder / name, max_nbytes=max_nbytes, error=error)


def open_shard(layout: ShardLayout, shard: str, *, error: type[InvalidFileError]) -> AbstractContextManager[int]:
    """Open a shard of an artifact, or of a directory of the user's own, which may hold links.

    Args:
        layout: The directory.
        shard: Name of the shard.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The shard cannot be opened. The class is `error`.
    """
    opener = open_regular if isinstance(layout, Structure) else open_source_file
    return opener(layout.path, shard, error=error)


def _is_snapshot(folder: Path) -> bool:
    """Return whether a directory is a snapshot in the Hub's cache: `REPO/snapshots/REVISION/`, beside `REPO/blobs/`."""
    snapshots = folder.absolute().parent
    return snapshots.name == "snapshots" and os.path.isdir(snapshots.parent / "blobs")
