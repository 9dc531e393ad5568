"""What an output folder is going to be: what may be replaced by it, and what tells after a crash that it is there.

An artifact is recognised under its final name by its manifest, which names every byte; a plain checkpoint by its
folder's inode, which a rename keeps, and its index.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qformat.errors import Option, TargetError
from qformat.names import INDEX_NAME, MANIFEST_NAME
from qformat.strict_json import Json


@dataclass(frozen=True, slots=True)
class OutputKind:
    """A kind of output folder.

    made_from: what its bytes depend on, for messages. obstacle: why a folder with something in it cannot be replaced
    by one of this kind, None where it can. identity: tells a finished folder from every other one that may stand under
    its name, None where there is none.
    """

    made_from: str
    obstacle: Callable[[Path], str | None]
    identity: Callable[[Path], Json]


def check_target(out: Path, *, replace: bool, kind: OutputKind) -> None:
    """Refuse an output path that holds something: anything, or with `replace` anything that is not of its kind.

    Raises TargetError.
    """
    if not os.path.lexists(out):
        return
    if not os.path.isdir(out) or os.path.islink(out):
        raise TargetError(f"{out}: exists and is no folder. Choose another name")
    if not holds_something(out):
        return
    if (obstacle := kind.obstacle(out)) is not None:
        raise TargetError(f"{out}: {obstacle}. Choose another name")
    if not replace:
        raise TargetError(f"{out}: exists already. Choose another name, or replace it with ", Option("force", True))


def holds_something(folder: Path) -> bool:
    """Return whether a folder has an entry; false for one that is gone. Raises TargetError: cannot be listed."""
    try:
        return bool(os.listdir(folder))
    except FileNotFoundError:  # another process has just finished there
        return False
    except OSError as problem:
        raise TargetError(f"{folder}: cannot be listed: {problem.strerror}. Choose another name") from None


def _no_artifact(folder: Path) -> str | None:
    return None if os.path.isfile(folder / MANIFEST_NAME) else "exists, is not empty and is no artifact"


def _no_checkpoint(folder: Path) -> str | None:
    if os.path.lexists(folder / MANIFEST_NAME):
        return "is a 4-bit artifact, which an export does not replace"
    return None if os.path.isfile(folder / INDEX_NAME) else "exists, is not empty and is no checkpoint with an index"


def _manifest_digest(folder: Path) -> Json:
    return _sha256_of(folder / MANIFEST_NAME)


def _inode_and_index(folder: Path) -> Json:
    index = _sha256_of(folder / INDEX_NAME)
    if index is None:
        return None
    status = os.lstat(folder)
    return [status.st_dev, status.st_ino, index]


def _sha256_of(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


ARTIFACT = OutputKind("source, recipe or options", _no_artifact, _manifest_digest)

CHECKPOINT = OutputKind("artifact or options", _no_checkpoint, _inode_and_index)
