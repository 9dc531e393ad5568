"""What the Hub alone names: revisions, commits, and the files that a repository lists."""

from __future__ import annotations

import re
from urllib.parse import unquote

from qformat.artifact.reading.regular_files import check_plain_name
from qformat.errors import InvalidFileError, Reason, UsageError
from qformat.names import is_repository_name

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REVISION_NBYTES = 255
_MAX_PATH_NBYTES = 1024
_DECODINGS = 3
"""How often a listed path is percent-decoded when it is checked: `%252e` hides one decoding deeper than `%2e`."""


def check_repository_name(text: str) -> str:
    """Return a repository's name, or refuse what is none. Raises UsageError."""
    if not is_repository_name(text):
        raise UsageError(f"{text!r}: is no repository of the Hub: its name has the form owner/name")
    return text


def is_commit(text: str) -> bool:
    """Whether a text is a full commit hash."""
    return _COMMIT.fullmatch(text) is not None


def check_revision(text: str) -> str:
    """Return the name of a branch, tag or commit, or refuse what can be none. Raises UsageError."""
    parts = text.split("/")
    if (
        not text.isprintable()
        or not 0 < len(text.encode("utf-8")) <= _MAX_REVISION_NBYTES
        or {"", ".", ".."} & {*parts}
    ):
        raise UsageError(f"{text!r}: is no revision: give the name of a branch or tag, or a commit's hash")
    return text


def check_listed_path(path: str, *, repository: str, error: type[InvalidFileError]) -> None:
    """Refuse a path of a listing that would leave its folder, as it is or percent-decoded.

    Raises `error` (path_escapes).
    """
    decoded = path
    for _ in range(_DECODINGS):
        if len(path.encode("utf-8")) > _MAX_PATH_NBYTES:
            raise error(Reason.PATH_ESCAPES, repository, f"lists a path of {len(path.encode('utf-8'))} bytes")
        for name in decoded.split("/"):
            check_plain_name(name, path=f"{repository} (its list of files: {path[:80]!r})", error=error)
        decoded = unquote(decoded)
