"""The HTTP client of huggingface_hub, bounded: by time for all requests, by more for the calls that we leave to it.

`session` returns the client that huggingface_hub shares between its calls, with the user's settings of proxies and
certificates. The time of every answer is bounded (`wire`).

`watched` bounds the calls of huggingface_hub itself, which has no limit of time or size and sleeps as long as a server
asks for. In the block:

- The token goes to the origin of the Hub only. A server of the Hub could name another host for the verification of an
  upload, and huggingface_hub would send the token there.
- Answers have a size limit and no compression, a limit of time without data, and ask for short pauses only.
- What huggingface_hub prints of an answer, such as remarks about a model card, is one short line without the token.
- A server that answers a request for a range with the complete file may do so a few times per file, and a listing has
  a limit of pages.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qformat import strict_json
from qformat.errors import HubError, InvalidFileError, Option, SourceError
from qformat.hub.reading.budget import PATIENCE
from qformat.hub.reading.refusals import one_line
from qformat.hub.reading.transfer import DEFAULT_PATIENCE, Patience
from qformat.hub.token import token_to_send

if TYPE_CHECKING:
    import httpx2

READING_TIMEOUT_S = 60.0
"""Time without data after which a request fails. huggingface_hub sets a shorter one for the content of files."""

MAX_CARD_ANSWER_NBYTES = 2**20
"""Largest answer about a model card that is read."""

MAX_CARD_REMARKS = 20
"""Most remarks about a model card that are printed."""

_READING = frozenset({"GET", "HEAD"})
"""Methods of requests that change nothing."""

_lock = threading.Lock()


@dataclass(slots=True)
class Watch:
    """What calls of huggingface_hub may do.

    Attributes:
        repository: Repository of the calls, for messages.
        endpoint: Address of the Hub.
        token: The token that is sent, None if there is none.
        patience: Limits.
        max_nbytes: Largest accepted answer in bytes.
        timeout_s: Time without data after which a request fails, in seconds.
    """

    repository: str
    endpoint: str
    token: str | None
    patience: Patience
    max_nbytes: int
    timeout_s: float
    _unranged: Counter[str] = field(default_factory=Counter, init=False)
    _pages: Counter[str] = field(default_factory=Counter, init=False)

    @classmethod
    def for_reading(
        cls, repository: str, *, patience: Patience = DEFAULT_PATIENCE, max_nbytes: int | None = None
    ) -> Watch:
        """Return what calls that read from the Hub may do, with the user's token.

        Args:
            repository: Repository of the calls, for messages.
            patience: Limits.
            max_nbytes: Largest accepted answer in bytes. The default is that of a small answer.

        Raises:
            UsageError: The token has characters that no token has.
        """
        from huggingface_hub import constants

        session()  # the token may need requests, too
        limit, timeout_s = max_nbytes or patience.answer_nbytes, patience.timeout_s or READING_TIMEOUT_S
        return cls(repository, constants.ENDPOINT, token_to_send(None), patience, limit, timeout_s)

    def concerns(self, request: httpx2.Request) -> bool:
        """Return whether a request may come from the watched calls: it writes, asks the Hub, or names qformat."""
        if request.method not in _READING or request.headers.get("User-Agent", "").startswith("qformat/"):
            return True
        return request.url.path.startswith("/api/") and origin(str(request.url)) == origin(self.endpoint)

    def check_request(self, request: httpx2.Request) -> None:
        """Set the limits of a request. Raise HubError if it would send the token to another host."""
        sent = request.headers.get("Authorization", "")
        if self.token is not None and self.token in sent and origin(str(request.url)) != origin(self.endpoint):
            if request.method not in _READING:
                raise HubError(
                    self.repository,
                    f"the Hub asks for a request with the token to another host, {request.url.host!r}",
                    next_step="Check HF_ENDPOINT, and report it to the operator of this Hub",
                )
            del request.headers["Authorization"]  # a redirect, which huggingface_hub follows with the token
        if "/tree/" in request.url.path:
            self._pages[request.url.path] += 1
            if self._pages[request.url.path] > self.patience.listing_pages:
                raise HubError(
                    self.repository, f"its list of files has more than {self.patience.listing_pages} pages",
                    next_step="Check HF_ENDPOINT",
                )  # fmt: skip
        request.headers["Accept-Encoding"] = "identity"
        request.extensions[PATIENCE] = self.patience
        set_before = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            what: self.timeout_s if set_before.get(what) is None else min(self.timeout_s, set_before[what])
            for what in ("connect", "read", "write", "pool")
        }

    def check_response(self, response: httpx2.Response) -> None:
        """Limit the size of a response and the pause that it asks for. Raise HubError if it cannot be used."""
        from qformat.hub.reading.wire import change_body, limit_size

        if pause_asked_for(response, self.patience) is None:
            for name in ("Retry-After", "RateLimit"):
                response.headers.pop(name, None)
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise HubError(
                self.repository, f"a response has the Content-Encoding {encoding[:40]!r}", next_step="Check HF_ENDPOINT"
            )
        address = response.request.url.path
        if response.status_code == 200 and "Range" in response.request.headers:
            self._unranged[address] += 1
            if self._unranged[address] >= self.patience.attempts:
                raise HubError(
                    self.repository, "the server sends complete files instead of ranges, and breaks them off",
                    next_step=("Leave out ", Option("keep_source")),
                )  # fmt: skip
        limit_size(response, self.max_nbytes, self._too_large)
        if address == "/api/validate-yaml":
            change_body(response, _with_short_messages)

    def _too_large(self) -> HubError:
        return HubError(
            self.repository, f"a response has more than {self.max_nbytes} bytes", next_step="Check HF_ENDPOINT"
        )


def _with_short_messages(data: bytes) -> bytes:
    """Shorten the remarks about a model card, which huggingface_hub prints as warnings."""
    try:
        record = strict_json.loads(data, path="answer", max_nbytes=MAX_CARD_ANSWER_NBYTES, error=SourceError)
    except InvalidFileError:
        return b""  # huggingface_hub finds that it is not JSON
    found: dict[str, strict_json.Json] = {}
    for name in ("errors", "warnings"):
        entries = record.get(name) if isinstance(record, dict) else None
        listed = entries if isinstance(entries, list) else []
        remarks = [entry.get("message") for entry in listed if isinstance(entry, dict)]
        found[name] = [{"message": one_line(str(remark))} for remark in remarks[:MAX_CARD_REMARKS]]
    return strict_json.dumps(found).encode()


class _Masking(logging.Filter):
    """Hides tokens and queries of addresses in the log of huggingface_hub, which prints warnings of servers."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = one_line(record.getMessage()), ()
        return True


_MASKING = _Masking()

_watches: list[Watch] = []


class _Bounded:
    """A factory of bounded clients, which makes them as another factory does."""

    def __init__(self, make: Callable[[], httpx2.Client]) -> None:
        self._make = make

    def __call__(self) -> httpx2.Client:
        from qformat.hub.reading.wire import bound

        client = self._make()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], _check_request],
            "response": [_check_response, *hooks["response"]],
        }
        return bound(client)


def _check_request(request: httpx2.Request) -> None:
    for watch in tuple(_watches):
        if watch.concerns(request):
            watch.check_request(request)


def _check_response(response: httpx2.Response) -> None:
    for watch in tuple(_watches):
        if watch.concerns(response.request):
            watch.check_response(response)


def session() -> httpx2.Client:
    """Return the client of huggingface_hub, whose answers are bounded."""
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils import _http

    with _lock:
        make = _http._GLOBAL_CLIENT_FACTORY  # it has no public name, and the user may have set it
        if not isinstance(make, _Bounded):
            set_client_factory(_Bounded(make))
        for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
            logging.getLogger(name).addFilter(_MASKING)
    return get_session()


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Bound the calls of huggingface_hub inside the block.

    Args:
        watch: What they may do.
    """
    session()
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of a URL, or empty values if it is invalid."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return "", "", None
    return parts.scheme, (parts.hostname or "").lower(), port


def pause_asked_for(response: httpx2.Response, patience: Patience) -> float | None:
    """Return the pause in seconds that Retry-After or the rate limit of the Hub asks for.

    Return None if there is neither, or if the pause is too long.

    Args:
        response: A response that refuses a request for now.
        patience: Limits.
    """
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    text = response.headers.get("Retry-After", "").strip()
    waits = []
    if text.isascii() and text.isdigit():
        waits.append(float(text))
    if response.status_code == 429:
        try:
            limit = parse_ratelimit_headers(response.headers)
            if limit is not None and limit.remaining == 0:
                waits.append(limit.reset_in_seconds + 1.0)  # the Hub rounds down to whole seconds
        except (ValueError, OverflowError):  # more digits than Python converts
            return None
    return max(waits) if waits and max(waits) <= patience.longest_asked_wait_s else None
