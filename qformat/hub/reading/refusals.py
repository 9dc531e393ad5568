"""What the Hub means when it refuses: its error codes and messages as errors that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformat import strict_json
from qformat.errors import HubError, InvalidFileError, Option, SourceError, Words

if TYPE_CHECKING:
    import httpx2

_MAX_REASON = 300
_MAX_BODY_NBYTES = 65536
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def refusal(repository: str, what: str, *, status: int, code: str | None, reason: str, endpoint: str) -> HubError:
    """Return the error for an answer that will not change by asking again."""
    said = f": {reason}" if reason else ""
    next_step: str | Words
    if code == "GatedRepo":
        problem = f"access is gated{said}"
        next_step = f"Ask for access at {endpoint}/{repository}, then {_LOG_IN}"
    elif code == "RevisionNotFound":
        problem, next_step = f"{what}: there is no such revision{said}", ("Check ", Option("revision"))
    elif code == "EntryNotFound":
        problem, next_step = f"{what}: there is no such file{said}", "Check the repository's files"
    elif status == 401 and "credentials" in reason.lower():
        problem, next_step = f"the token is not accepted{said}", f"Check it, or {_LOG_IN}"
    elif code == "RepoNotFound" or (code is None and status in {401, 404}):
        problem = f"there is no such repository, or it is private{said}"
        next_step = f"Check the name; if it is private, {_LOG_IN}"
    elif status == 403:
        problem, next_step = f"{what}: access is refused{said}", f"Check what the token may do, or {_LOG_IN}"
    else:
        problem, next_step = f"{what}: the server answers {status}{said}", "Check the name and HF_ENDPOINT"
    return HubError(repository, problem, next_step=next_step, status=status, code=code)


def server_reason(response: httpx2.Response, *, secret: str) -> str:
    """Return what the server gives as its reason, in one short line without the secret, or nothing."""
    text = response.headers.get("X-Error-Message", "") or _from_body(response)
    if secret:
        text = text.replace(secret, "***")
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return (line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 3] + "...").rstrip(".")


def _from_body(response: httpx2.Response) -> str:
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > _MAX_BODY_NBYTES:
            return ""
    try:
        parsed = strict_json.loads(bytes(body), path="answer", max_nbytes=_MAX_BODY_NBYTES, error=SourceError)
    except InvalidFileError:
        return ""
    error = parsed.get("error") if isinstance(parsed, dict) else None
    return error if isinstance(error, str) else ""
