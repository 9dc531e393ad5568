"""Recognizes what takes the place of a file that was not fetched: pointers of Git LFS or git-annex, and error pages."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.reading.file_roles import accompanies
from qformat.errors import InvalidFileError, Reason

HEAD_NBYTES = 1024
"""Number of bytes at the beginning of a file that decide. A Git LFS pointer is shorter than 1,024 bytes."""

_LFS_POINTER = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/v\d")
_LFS_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
_ANNEX_POINTER = re.compile(rb"/annex/objects/\S+")
_MARKUP = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!doctype\s+html|<html\b|<\?xml\b.{0,200}<Error>)", re.IGNORECASE | re.DOTALL
)
_MAY_BE_MARKUP = (".html", ".htm")
_HUB_ANSWERS = (
    b"Entry not found",
    b"Repository not found",
    b"Invalid username or password",
    b"Access to model ",
    b"Access to this resource is disabled",
)
"""How the texts begin that the Hub answers in place of a file. `curl` and `wget` store them under the file's name."""

_DOWNLOAD = "download it again, for example with `hf download OWNER/NAME`"


@dataclass(frozen=True, slots=True)
class StandIn:
    """What a file contains in place of its content.

    Attributes:
        problem: What the file is.
        next_step: What the user can do.
    """

    problem: str
    next_step: str


def stand_in(name: str, head: bytes, *, is_text: bool = False) -> StandIn | None:
    """Return what a file contains in place of its content, None if it may be the file itself.

    Args:
        name: Name of the file.
        head: The first `HEAD_NBYTES` bytes of the file, or the entire file if it is shorter.
        is_text: Whether the content may be any text, a web page included.
    """
    if len(head) < HEAD_NBYTES and _LFS_POINTER.match(head):
        size = _LFS_SIZE.search(head)
        missing = f", which has {int(size[1]):,} bytes" if size is not None else ""
        return StandIn(
            f"is a Git LFS pointer, not the file itself{missing}",
            f"Run `git lfs install` and `git lfs pull` in its directory, or {_DOWNLOAD}",
        )
    if len(head) < HEAD_NBYTES and _ANNEX_POINTER.match(head):
        return StandIn(
            "is a git-annex pointer, not the file itself", f"Run `git annex get .` in its directory, or {_DOWNLOAD}"
        )
    may_be_markup = is_text or accompanies(name) or name.lower().endswith(_MAY_BE_MARKUP)
    if _MARKUP.match(head) and not may_be_markup:
        return StandIn(
            "is a web page, not the file itself: the page of an error, of a login, or one that only shows the file",
            f"{_DOWNLOAD[0].upper()}{_DOWNLOAD[1:]}; the address of a file of the Hub contains /resolve/, not /blob/",
        )
    if len(head) < HEAD_NBYTES and head.startswith(_HUB_ANSWERS):
        answer = head.decode("utf-8", "replace").strip().splitlines()[0][:100]
        return StandIn(
            f"contains an answer of the Hub ({answer!r}), not the file itself",
            "Check its name, log in with `hf auth login` if it is gated, and download it again with `hf download`",
        )
    return None


def stand_in_of(path: Path, *, is_text: bool = False) -> StandIn | None:
    """Return what a file contains in place of its content, None if it may be the file itself or cannot be read.

    Args:
        path: Path of the file.
        is_text: Whether the content may be any text, a web page included.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return stand_in(path.name, os.pread(descriptor, HEAD_NBYTES, 0), is_text=is_text)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def refuse_stand_in(name: str, head: bytes, *, path: Path, error: type[InvalidFileError]) -> None:
    """Reject a file that was not fetched.

    Args:
        name: Name of the file.
        head: The first `HEAD_NBYTES` bytes of the file, or the entire file if it is shorter.
        path: Path of the file, for error messages.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The file is a pointer or an error page (missing_file). The class is `error`.
    """
    found = stand_in(name, head)
    if found is not None:
        raise error(Reason.MISSING_FILE, path, found.problem, next_step=found.next_step)
