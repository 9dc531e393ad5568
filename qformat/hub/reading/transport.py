"""One request to the Hub: through huggingface_hub's own session, with retries, timeouts, and a token that stays home.

huggingface_hub retries some of its requests and not others (not the resolution of a revision, not the first HEAD of
a file). Here every request goes the same way. Redirects are followed by hand: the token goes to the Hub's own origin
and nowhere else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from qformat.errors import HubError
from qformat.hub.reading.refusals import refusal, server_reason
from qformat.version import __version__

if TYPE_CHECKING:
    import httpx2

_log = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that may be another one in a moment."""

SLOWEST_NBYTES_PER_S = 1000.0
"""An answer slower than this over the whole time limit is cut off and asked for again."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_WORTH_TELLING_S = 1.0
"""A longer pause is shown to the user, who would otherwise see a bar that stands still."""

_MAX_WAIT_ASKED_FOR_S = 300.0
"""A server may ask for a pause; a longer one is not waited for."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request is tried: attempts in a row that bring nothing, and the waits between them, in seconds.

    The waits are 0.2, 0.6, 1.8, 5.4, 16.2 and 20 s: a server that restarts is outlasted, one that is gone is named
    within a minute. timeout_s: of silence; None for huggingface_hub's own setting (HF_HUB_DOWNLOAD_TIMEOUT).
    """

    attempts: int = 7
    first_wait_s: float = 0.2
    factor: float = 3.0
    longest_wait_s: float = 20.0
    timeout_s: float | None = None

    def wait_s(self, failures: int) -> float:
        """Return the pause after this many failures in a row."""
        return float(min(self.first_wait_s * self.factor ** (failures - 1), self.longest_wait_s))


DEFAULT_PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class Answer:
    """A good answer. linked: the headers of the Hub's own redirect to a storage elsewhere, if it made one."""

    response: httpx2.Response
    linked: Mapping[str, str] | None


class Unusable(Exception):
    """An answer that cannot be used, but the next one may be. Never leaves this package."""


@dataclass(slots=True)
class Retries:
    """Counts the failures in a row of one piece of work and waits between them."""

    repository: str
    what: str
    patience: Patience
    closing: threading.Event = field(default_factory=threading.Event)
    _failures: int = field(default=0)

    def progress(self) -> None:
        """Note that something arrived: the count begins anew."""
        self._failures = 0

    def failed(self, problem: str, *, attempts: int | None = None, wait_s: float | None = None) -> None:
        """Wait before the next attempt, or give up. Raises HubError."""
        self._failures += 1
        if self._failures >= (attempts or self.patience.attempts):
            raise HubError(
                self.repository,
                f"{self.what}: {problem}, {self._failures} times in a row",
                next_step="Check the connection; the same command continues where this one stopped",
            )
        pause = self.patience.wait_s(self._failures) if wait_s is None else wait_s
        level = logging.WARNING if pause >= _WORTH_TELLING_S else logging.INFO
        _log.log(level, "%s: %s: %s; trying again in %.1f s", self.repository, self.what, problem, pause)
        if self.closing.wait(pause):
            raise HubError(self.repository, f"{self.what}: stopped", next_step="The same command continues")


class Transport:
    """GET requests for one repository. Safe to use from several threads.

    token: as for huggingface_hub: None takes the user's own (HF_TOKEN or the stored one), False sends none.
    """

    def __init__(
        self, repository: str, *, token: str | bool | None = None, patience: Patience | None = None,
    ) -> None:  # fmt: skip
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self.repository = repository
        self.endpoint = constants.ENDPOINT
        self.patience = patience or DEFAULT_PATIENCE
        self._timeout_s = self.patience.timeout_s or float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self._headers = build_hf_headers(token=token, library_name="qformat", library_version=__version__)
        self._closing = threading.Event()
        self._answered = False

    def retries(self, what: str) -> Retries:
        """Return a counter of failures for one piece of work; `what` names it in messages."""
        return Retries(self.repository, what, self.patience, self._closing)

    def close(self) -> None:
        """Let no attempt wait for its turn any longer."""
        self._closing.set()

    def get_small(self, url: str, what: str, *, max_nbytes: int) -> tuple[bytes, Mapping[str, str]]:
        """Return body and headers of a small answer. Raises HubError."""
        retries = self.retries(what)
        while True:
            with self.attempt(retries), self.open(url, what, {}) as answer:
                body = bytearray()
                for chunk in answer.response.iter_raw():
                    body += chunk
                    if len(body) > max_nbytes:
                        raise HubError(
                            self.repository, f"{what}: more than {max_nbytes} bytes came", next_step="Report it"
                        )
                return bytes(body), answer.response.headers

    @contextmanager
    def attempt(self, retries: Retries) -> Iterator[None]:
        """Run one attempt: what may pass is counted and waited for, then the block ends without an error."""
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
            retries.failed(str(problem))
        except (httpx2.HTTPError, httpx2.InvalidURL) as problem:
            raise HubError(
                self.repository, f"{retries.what}: {self._shown(problem)}", next_step="Check HF_ENDPOINT and the proxy"
            ) from None

    @contextmanager
    def open(self, url: str, what: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Send one request, follow its redirects and yield the good answer, whose body was not read yet.

        Raises: HubError where the Hub refuses; inside `attempt`, what may pass.
        """
        from huggingface_hub import constants, get_session

        if constants.is_offline_mode():
            raise HubError(
                self.repository, f"{what}: is not in the local cache, and HF_HUB_OFFLINE forbids requests",
                next_step="Unset HF_HUB_OFFLINE, or fill the cache first",
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
        """Whether a URL has the origin of the Hub itself: the only one that gets the token."""
        return _origin(url) == _origin(self.endpoint)

    def refuse_trickle(self, nbytes: int, seconds: float) -> None:
        """Give up on an answer that comes too slowly to be worth waiting for. Raises what `attempt` counts."""
        if seconds > self._timeout_s and nbytes < SLOWEST_NBYTES_PER_S * seconds:
            raise Unusable(f"only {nbytes} bytes came in {seconds:.0f} s")

    def _headers_for(self, url: str) -> dict[str, str]:
        if self.is_hub(url):
            return dict(self._headers)
        return {name: value for name, value in self._headers.items() if name.lower() != "authorization"}

    def _redirected(self, response: httpx2.Response, what: str) -> str:
        try:
            target = urljoin(str(response.url), response.headers.get("Location", ""))
            scheme = urlsplit(target).scheme
        except ValueError:  # no address at all, such as http://[
            target, scheme = "", ""
        if scheme != "https" and (scheme != "http" or urlsplit(self.endpoint).scheme != "http"):
            raise HubError(
                self.repository,
                f"{what}: the Hub redirects to a {scheme or 'nameless'} address, and only https is followed",
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
        if not self.is_hub(str(response.url)) and status != 416:  # an address that the Hub signed: they expire
            raise Unusable(
                f"the storage that the Hub redirects to answers {status}" + (f" ({reason})" if reason else "")
            )
        raise refusal(
            self.repository, what, status=status, code=response.headers.get("X-Error-Code"), reason=reason,
            endpoint=self.endpoint,
        )  # fmt: skip

    def _shown(self, problem: Exception) -> str:
        """Name a failure of the connection: by its kind, since the texts of libraries may hold signed addresses."""
        kinds = {"ConnectTimeout": "no connection in time", "ReadTimeout": "silence for too long"}
        name = type(problem).__name__
        text = {"ConnectError": f"no connection ({problem})", "RemoteProtocolError": f"broken answer ({problem})"}
        return kinds.get(name) or text.get(name) or f"the connection broke ({name})"


class _Busy(Exception):
    """An answer that asks to come back later."""

    def __init__(self, problem: str, wait_s: float | None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.wait_s = wait_s


def _asked_wait_s(response: httpx2.Response) -> float | None:
    """Return the pause in seconds that Retry-After, or the Hub's account of its rate limit, asks for.

    None without one, or one that is too long to be waited for.
    """
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    text = response.headers.get("Retry-After", "").strip()
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if text.isdigit() and len(text) <= 6:
        wait_s = float(text)
    elif limit is not None and limit.remaining == 0:
        wait_s = limit.reset_in_seconds + 1.0  # it counts whole seconds
    else:
        return None
    return wait_s if wait_s <= _MAX_WAIT_ASKED_FOR_S else None


def _origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port; nothing's origin for what is no address."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return "", "", None
    return parts.scheme, (parts.hostname or "").lower(), port
