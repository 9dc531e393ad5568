"""Checks of the names that the Hub uses: repositories, revisions, commits and paths of listed files."""

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
"""Number of times that a listed path is percent-decoded and checked: `%252e` needs one more than `%2e`."""


def check_repository_name(text: str) -> str:
    """Return the text if it has the form owner/name.

    Raises:
        UsageError: The text is not the name of a repository.
    """
    if not is_repository_name(text):
        raise UsageError(f"{text!r} is not the name of a repository on the Hub. Names have the form owner/name")
    return text


def is_commit(text: str) -> bool:
    """Return whether a text is a full commit hash."""
    return _COMMIT.fullmatch(text) is not None


def check_revision(text: str) -> str:
    """Return the text if it can be the name of a branch, tag or commit.

    Raises:
        UsageError: The text cannot be a revision.
    """
    parts = text.split("/")
    if (
        not text.isprintable()
        or not 0 < len(text.encode("utf-8")) <= _MAX_REVISION_NBYTES
        or {"", ".", ".."} & {*parts}
    ):
        raise UsageError(f"{text!r} is not a revision. Specify a branch, a tag or a commit hash")
    return text


def check_listed_path(path: str, *, repository: str, error: type[InvalidFileError]) -> None:
    """Check that a listed path stays inside its repository, also after it is percent-decoded.

    Args:
        path: Path in the listing of a repository.
        repository: Name of the repository, for messages.
        error: Type of the error to raise.

    Raises:
        InvalidFileError: The path escapes or is too long (path_escapes). The error is of type `error`.
    """
    decoded = path
    for _ in range(_DECODINGS):
        if len(path.encode("utf-8")) > _MAX_PATH_NBYTES:
            raise error(
                Reason.PATH_ESCAPES,
                repository,
                f"lists a path of {len(path.encode('utf-8'))} bytes, at most {_MAX_PATH_NBYTES} are allowed",
            )
        for name in decoded.split("/"):
            check_plain_name(name, path=f"{repository} (its list of files: {path[:80]!r})", error=error)
        decoded = unquote(decoded)
