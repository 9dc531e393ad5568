"""Kinds of output directories: what each kind may replace, and how it is recognised after a crash.

An artifact is recognised by its manifest, which covers every byte. A plain checkpoint is recognised by its index and
by the inode of its directory, which a rename does not change.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qformat.errors import Option, TargetError
from qformat.named_files import open_named
from qformat.names import INDEX_NAME, MANIFEST_NAME
from qformat.strict_json import Json


@dataclass(frozen=True, slots=True)
class OutputKind:
    """Kind of output directory.

    Attributes:
        made_from: What its contents depend on, for messages.
        obstacle: Function that returns why a directory that is not empty cannot be replaced, None if it can be.
        identity: Function that returns a value by which a finished directory can be recognised, None if it does not
            exist.
    """

    made_from: str
    obstacle: Callable[[Path], str | None]
    identity: Callable[[Path], Json]


def check_target(out: Path, *, replace: bool, kind: OutputKind) -> None:
    """Check that an output path is free, or that its contents may be replaced.

    Args:
        out: Output path.
        replace: Accept an existing directory of the same kind.
        kind: Kind of the output.

    Raises:
        TargetError: The path exists and must not be replaced.
    """
    if not os.path.lexists(out):
        return
    if not os.path.isdir(out) or os.path.islink(out):
        raise TargetError(f"{out}: exists and is not a directory. Choose another name")
    if not holds_something(out):
        return
    if (obstacle := kind.obstacle(out)) is not None:
        raise TargetError(f"{out}: {obstacle}. Choose another name")
    if not replace:
        raise TargetError(f"{out}: already exists. Choose another name, or replace it with ", Option("force", True))


def holds_something(folder: Path) -> bool:
    """Return whether a directory exists and is not empty.

    Raises:
        TargetError: The directory cannot be read.
    """
    with reading_output(folder):
        try:
            return bool(os.listdir(folder))
        except FileNotFoundError:  # another process has just removed it
            return False


@contextmanager
def reading_output(path: Path) -> Iterator[None]:
    """Translate the errors of reading what lies at an output path, so that they name it and not an input.

    Args:
        path: Output path, or a file in it.

    Raises:
        TargetError: It cannot be read.
    """
    try:
        yield
    except OSError as problem:
        raise TargetError(
            f"{problem.filename or path}: cannot be read: {problem.strerror}. Correct its permissions, or choose "
            "another output"
        ) from problem


def _no_artifact(folder: Path) -> str | None:
    return None if os.path.isfile(folder / MANIFEST_NAME) else "exists, is not empty and is not an artifact"


def _no_checkpoint(folder: Path) -> str | None:
    if os.path.lexists(folder / MANIFEST_NAME):
        return "is a 4-bit artifact, which an export does not replace"
    if os.path.isfile(folder / INDEX_NAME):
        return None
    return "exists, is not empty and is not a checkpoint with an index"


def _manifest_digest(folder: Path) -> Json:
    return _sha256_of(folder / MANIFEST_NAME)


def _inode_and_index(folder: Path) -> Json:
    index = _sha256_of(folder / INDEX_NAME)
    if index is None:
        return None
    status = os.lstat(folder)
    return [status.st_dev, status.st_ino, index]


def _sha256_of(path: Path) -> str | None:
    with reading_output(path):
        try:
            with open_named(path) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None


ARTIFACT = OutputKind("source, recipe or options", _no_artifact, _manifest_digest)

CHECKPOINT = OutputKind("artifact or options", _no_checkpoint, _inode_and_index)
