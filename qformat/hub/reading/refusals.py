"""Errors for requests that the Hub rejects, with the next step for each of its error codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformat import strict_json
from qformat.errors import HubError, InvalidFileError, Option, SourceError, Words
from qformat.hub.reading.budget import Budget, Unusable
from qformat.secrets import masked

if TYPE_CHECKING:
    import httpx2

_MAX_REASON = 300
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def refusal(repository: str, what: str, *, status: int, code: str | None, reason: str, endpoint: str) -> HubError:
    """Return the error for a rejected request that a retry would not fix.

    Args:
        repository: Name of the repository.
        what: Content of the request, for messages.
        status: HTTP status.
        code: Error code of the Hub (X-Error-Code), or None.
        reason: Message of the server, or an empty text.
        endpoint: Address of the Hub.
    """
    said = f": {reason}" if reason else ""
    next_step: str | Words
    if code == "GatedRepo":
        problem = f"access is gated{said}"
        next_step = f"Request access at {endpoint}/{repository}, then {_LOG_IN}"
    elif code == "RevisionNotFound":
        problem, next_step = f"{what}: the revision does not exist{said}", ("Check ", Option("revision"))
    elif code == "EntryNotFound":
        problem, next_step = f"{what}: the file does not exist{said}", "Check the repository's files"
    elif status == 401 and "credentials" in reason.lower():
        problem, next_step = f"the token is invalid{said}", f"Check it, or {_LOG_IN}"
    elif code == "RepoNotFound" or (code is None and status in {401, 404}):
        problem = f"the repository does not exist or is private{said}"
        next_step = f"Check the name; if it is private, {_LOG_IN}"
    elif status == 403:
        problem, next_step = f"{what}: access is denied{said}", f"Check the permissions of the token, or {_LOG_IN}"
    else:
        problem, next_step = f"{what}: the server answers {status}{said}", "Check the name and HF_ENDPOINT"
    return HubError(repository, problem, next_step=next_step, status=status, code=code)


def server_reason(response: httpx2.Response, budget: Budget) -> str:
    """Return the server's message in one short line, or an empty text.

    Args:
        response: The response. Its body may be read.
        budget: Budget of reading the body.
    """
    return one_line(response.headers.get("X-Error-Message", "") or _from_body(response, budget)).rstrip(".")


def one_line(text: str) -> str:
    """Return a text of a server as one short line without tokens and control characters."""
    shown = "".join(character if character.isprintable() else " " for character in masked(text))
    line = " ".join(shown.split())
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 3] + "..."


def _from_body(response: httpx2.Response, budget: Budget) -> str:
    import httpx2

    limit = budget.patience.error_nbytes
    body = bytearray()
    try:
        budget.begin_answer()
        for chunk in response.iter_raw():
            body += chunk
            budget.take_small(len(body), max_nbytes=limit, within_s=budget.patience.error_s)
        parsed = strict_json.loads(bytes(body), path="answer", max_nbytes=limit, error=SourceError)
    except (HubError, Unusable, InvalidFileError, httpx2.HTTPError):
        # It is too large, too slow, broken off, or not JSON. The status says enough.
        return ""
    error = parsed.get("error") if isinstance(parsed, dict) else None
    return error if isinstance(error, str) else ""
