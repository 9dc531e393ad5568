"""Requests to the Hub through the session of huggingface_hub, with retries and timeouts.

huggingface_hub retries some of its requests but not all: neither the resolution of a revision nor the first HEAD of a
file. Here all requests are retried alike. Redirects are followed explicitly, so that the token is sent only to the
origin of the Hub.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from qformat.errors import HubError, Words
from qformat.hub.reading.refusals import refusal, server_reason
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Patience, Transfer
from qformat.version import __version__

if TYPE_CHECKING:
    import httpx2

_log = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a request is repeated."""

SLOWEST_NBYTES_PER_S = 1000.0
"""A response that is slower than this over the whole timeout is abandoned and requested again."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_WORTH_TELLING_S = 1.0
"""Shortest pause that is reported to the user, because the progress bar would seem to hang."""

_MAX_WAIT_ASKED_FOR_S = 300.0
"""Longest pause requested by a server that is respected."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful response.

    Attributes:
        response: The response, whose body has not been read.
        linked: Headers of the Hub's redirect to a storage on another host, or None if there was none.
    """

    response: httpx2.Response
    linked: Mapping[str, str] | None


_NEXT_STEP: Words = ("Check the connection. The same command resumes where this one stopped",)


class Unusable(Exception):
    """A response that cannot be used, although the next one may be usable. It does not leave this package.

    Args:
        problem: What is wrong with the response.
        next_step: What the user can do if all further responses are unusable too.
    """

    def __init__(self, problem: str, *, next_step: Words = _NEXT_STEP) -> None:
        super().__init__(problem)
        self.next_step = next_step


@dataclass(slots=True)
class Retries:
    """Counts consecutive failures of one task and waits between the attempts.

    Attributes:
        repository: Repository of the request, for messages.
        what: The task, for messages.
        patience: Number of attempts and the pauses between them.
        closing: Event that ends a pause early.
    """

    repository: str
    what: str
    patience: Patience
    closing: threading.Event = field(default_factory=threading.Event)
    _failures: int = field(default=0)

    def progress(self) -> None:
        """Reset the count, because data arrived."""
        self._failures = 0

    def failed(
        self, problem: str, *, attempts: int | None = None, wait_s: float | None = None, next_step: Words = _NEXT_STEP
    ) -> None:
        """Wait before the next attempt, or give up.

        Args:
            problem: What failed.
            attempts: Consecutive failures after which to give up. The default is that of `patience`.
            wait_s: Pause in seconds. The default is that of `patience`.
            next_step: What the user can do.

        Raises:
            HubError: Too many attempts have failed, or the transport was closed.
        """
        self._failures += 1
        if self._failures >= (attempts or self.patience.attempts):
            raise HubError(
                self.repository,
                f"{self.what}: {problem}, {self._failures} times in a row",
                next_step=next_step,
            )
        pause = self.patience.wait_s(self._failures) if wait_s is None else wait_s
        level = logging.WARNING if pause >= _WORTH_TELLING_S else logging.INFO
        _log.log(level, "%s: %s: %s; retrying in %.1f s", self.repository, self.what, problem, pause)
        if self.closing.wait(pause):
            raise HubError(self.repository, f"{self.what}: stopped", next_step="The same command resumes it")


class Transport:
    """GET requests for one repository. It is thread-safe.

    Args:
        repository: Name of the repository, `owner/name`.
        token: Token for the Hub. None uses HF_TOKEN or the stored token, False sends none.
        transfer: Sizes and retries of requests.
    """

    def __init__(
        self, repository: str, *, token: str | bool | None = None, transfer: Transfer = DEFAULT_TRANSFER
    ) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self.repository = repository
        self.endpoint = constants.ENDPOINT
        self.transfer, self.patience = transfer, transfer.patience
        self._timeout_s = self.patience.timeout_s or float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self._headers = build_hf_headers(token=token, library_name="qformat", library_version=__version__)
        self._closing = threading.Event()
        self._answered = False

    def retries(self, what: str) -> Retries:
        """Return a counter of failures for one task. `what` describes the task in messages."""
        return Retries(self.repository, what, self.patience, self._closing)

    def close(self) -> None:
        """End all pauses between attempts with an error."""
        self._closing.set()

    def get_small(self, url: str, what: str, *, max_nbytes: int) -> tuple[bytes, Mapping[str, str]]:
        """Return the body and the headers of a small response.

        Args:
            url: Address.
            what: Content of the response, for messages.
            max_nbytes: Largest accepted body in bytes.

        Raises:
            HubError: The request failed, or the body is too large.
        """
        retries = self.retries(what)
        while True:
            with self.attempt(retries), self.open(url, what, {}) as answer:
                body = bytearray()
                for chunk in answer.response.iter_raw():
                    body += chunk
                    if len(body) > max_nbytes:
                        raise HubError(
                            self.repository,
                            f"{what}: the response has more than {max_nbytes} bytes",
                            next_step="Check HF_ENDPOINT",
                        )
                return bytes(body), answer.response.headers

    @contextmanager
    def attempt(self, retries: Retries) -> Iterator[None]:
        """Run one attempt. After a transient failure, count it, wait, and end the block without an error."""
        import httpx2

        try:
            yield
        except httpx2.ConnectError as problem:
            # A host that never answered is more likely misspelt or offline than restarting.
            retries.failed(self._shown(problem), attempts=None if self._answered else 2)
        except (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError) as problem:
            retries.failed(self._shown(problem))
        except _Busy as busy:
            retries.failed(busy.problem, wait_s=busy.wait_s)
        except Unusable as problem:
            retries.failed(str(problem), next_step=problem.next_step)
        except (httpx2.HTTPError, httpx2.InvalidURL) as problem:
            raise HubError(
                self.repository, f"{retries.what}: {self._shown(problem)}", next_step="Check HF_ENDPOINT and the proxy"
            ) from None

    @contextmanager
    def open(self, url: str, what: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Send one request, follow its redirects and yield the successful response with its body unread.

        Use it inside `attempt`, which handles transient failures.

        Args:
            url: Address.
            what: Content of the response, for messages.
            headers: Additional headers.

        Raises:
            HubError: The Hub rejects the request, or requests are not allowed.
        """
        from huggingface_hub import constants, get_session

        if constants.is_offline_mode():
            raise HubError(
                self.repository, f"{what}: not in the local cache, and HF_HUB_OFFLINE forbids requests",
                next_step="Unset HF_HUB_OFFLINE, or download it to the cache first",
            )  # fmt: skip
        linked: Mapping[str, str] | None = None
        for _ in range(_MAX_REDIRECTS):
            request = get_session().stream(
                "GET",
                url,
                headers={**self._headers_for(url), "Accept-Encoding": "identity", **headers},
                follow_redirects=False,
                timeout=self._timeout_s,
            )
            with request as response:
                self._answered = True
                if response.status_code not in _REDIRECTS:
                    self._refuse_bad(response, what)
                    yield Answer(response, linked)
                    return
                url = self._redirected(response, what)
                if not self.is_hub(url) and self.is_hub(str(response.url)):
                    linked = response.headers
        raise HubError(self.repository, f"{what}: more than {_MAX_REDIRECTS} redirects", next_step="Check HF_ENDPOINT")

    def is_hub(self, url: str) -> bool:
        """Return whether a URL has the origin of the Hub, which is the only one that receives the token."""
        return _origin(url) == _origin(self.endpoint)

    def refuse_trickle(self, nbytes: int, seconds: float) -> None:
        """Abandon a response that arrives too slowly.

        Args:
            nbytes: Bytes that have arrived.
            seconds: Time since the response began.

        Raises:
            Unusable: The response is too slow. `attempt` counts it as a failure.
        """
        if seconds > self._timeout_s and nbytes < SLOWEST_NBYTES_PER_S * seconds:
            raise Unusable(f"only {nbytes} bytes arrived in {seconds:.0f} s")

    def _headers_for(self, url: str) -> dict[str, str]:
        if self.is_hub(url):
            return dict(self._headers)
        return {name: value for name, value in self._headers.items() if name.lower() != "authorization"}

    def _redirected(self, response: httpx2.Response, what: str) -> str:
        try:
            target = urljoin(str(response.url), response.headers.get("Location", ""))
            scheme = urlsplit(target).scheme
        except ValueError:  # not a valid URL, such as http://[
            target, scheme = "", ""
        if scheme != "https" and (scheme != "http" or urlsplit(self.endpoint).scheme != "http"):
            address = f"a URL with the scheme {scheme!r}" if scheme else "an invalid URL"
            raise HubError(
                self.repository,
                f"{what}: the Hub redirects to {address}, expected https",
                next_step="Check HF_ENDPOINT",
            )
        return target

    def _refuse_bad(self, response: httpx2.Response, what: str) -> None:
        status = response.status_code
        if status in {200, 206}:
            return
        reason = server_reason(response, secret=self._headers.get("authorization", "").removeprefix("Bearer "))
        if status in RETRIED_STATUSES:
            raise _Busy(f"the server answers {status}" + (f" ({reason})" if reason else ""), _asked_wait_s(response))
        if not self.is_hub(str(response.url)) and status != 416:  # a signed URL, which may have expired
            raise Unusable(
                f"the storage server that the Hub redirects to answers {status}" + (f" ({reason})" if reason else "")
            )
        raise refusal(
            self.repository, what, status=status, code=response.headers.get("X-Error-Code"), reason=reason,
            endpoint=self.endpoint,
        )  # fmt: skip

    def _shown(self, problem: Exception) -> str:
        """Describe a failed connection by its kind, because messages of libraries may contain signed URLs."""
        kinds = {"ConnectTimeout": "timeout while connecting", "ReadTimeout": "timeout while waiting for data"}
        name = type(problem).__name__
        text = {"ConnectError": f"no connection ({problem})", "RemoteProtocolError": f"invalid response ({problem})"}
        return kinds.get(name) or text.get(name) or f"the connection broke ({name})"


class _Busy(Exception):
    """A response that asks the client to come back later."""

    def __init__(self, problem: str, wait_s: float | None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.wait_s = wait_s


def _asked_wait_s(response: httpx2.Response) -> float | None:
    """Return the pause in seconds that Retry-After or the rate limit of the Hub asks for.

    Return None if there is neither, or if the pause is too long.
    """
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    text = response.headers.get("Retry-After", "").strip()
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if text.isdigit() and len(text) <= 6:
        wait_s = float(text)
    elif limit is not None and limit.remaining == 0:
        wait_s = limit.reset_in_seconds + 1.0  # the Hub rounds down to whole seconds
    else:
        return None
    return wait_s if wait_s <= _MAX_WAIT_ASKED_FOR_S else None


def _origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of a URL, or empty values if it is invalid."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return "", "", None
    return parts.scheme, (parts.hostname or "").lower(), port
