"""Requests to the Hub through the session of huggingface_hub, each within a budget.

huggingface_hub retries some of its requests but not all: neither the resolution of a revision nor the first HEAD of a
file. Here all requests are retried alike. Redirects are followed explicitly, so that the token is sent only to the
origin of the Hub.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from qformat.errors import HubError
from qformat.hub.client import origin, pause_asked_for, session
from qformat.hub.reading.budget import PATIENCE, SLOW, Budget, Unusable
from qformat.hub.reading.refusals import refusal, server_reason
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer
from qformat.hub.token import token_to_send
from qformat.version import __version__

if TYPE_CHECKING:
    import httpx2

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a request is repeated."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful response.

    Attributes:
        response: The response, whose body has not been read.
        linked: Headers of the Hub's redirect to a storage on another host, or None if there was none.
    """

    response: httpx2.Response
    linked: Mapping[str, str] | None


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

        self.repository = repository
        self.endpoint = constants.ENDPOINT
        self.transfer, self.patience = transfer, transfer.patience
        self._timeout_s = self.patience.timeout_s or float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        session()  # the token may need requests, too
        self.token = token_to_send(token)
        # huggingface_hub would ask the server for names of programs before it makes headers.
        origin = constants.HF_HUB_USER_AGENT_ORIGIN
        self._headers = {"User-Agent": f"qformat/{__version__}" + (f"; origin/{origin}" if origin else "")}
        if self.token is not None:
            self._headers["Authorization"] = f"Bearer {self.token}"
        self._closing = threading.Event()
        self._answered = False

    def budget(self, what: str, *, nbytes: int = 0) -> Budget:
        """Return the budget of one task.

        Args:
            what: The task, for messages.
            nbytes: Number of bytes of a file that the task shall keep.
        """
        return Budget(
            self.repository,
            what,
            self.patience,
            nbytes=nbytes,
            max_discarded_nbytes=2 * self.transfer.max_skipped_nbytes,
            closing=self._closing,
        )

    def close(self) -> None:
        """End all pauses between attempts with an error."""
        self._closing.set()

    def get_small(self, url: str, what: str, *, budget: Budget | None = None) -> tuple[bytes, Mapping[str, str]]:
        """Return the body and the headers of a small response.

        Args:
            url: Address.
            what: Content of the response, for messages.
            budget: Budget of the task that the request belongs to. By default the request is a task of its own.

        Raises:
            HubError: The request failed, or the body is too large.
        """
        budget = budget or self.budget(what)
        while True:
            with self.attempt(budget), self.open(url, what, {}) as answer:
                encoding = answer.response.headers.get("Content-Encoding", "identity")
                if encoding != "identity":
                    raise Unusable(f"the response has the Content-Encoding {encoding[:40]!r}")
                budget.begin_answer()
                body = bytearray()
                for chunk in answer.response.iter_raw():
                    body += chunk
                    budget.take_small(len(body), max_nbytes=self.patience.answer_nbytes)
                budget.answered()
                return bytes(body), answer.response.headers

    @contextmanager
    def attempt(self, budget: Budget) -> Iterator[None]:
        """Run one attempt. After a transient failure, count it, wait, and end the block without an error."""
        import httpx2

        try:
            yield
        except httpx2.ConnectError as problem:
            # A host that never answered is more likely misspelt or offline than restarting.
            budget.failed(self._shown(problem), attempts=None if self._answered else 2)
        except httpx2.TimeoutException as problem:
            is_slow = str(problem).startswith(SLOW)
            budget.failed(self._shown(problem), attempts=self.patience.slow_attempts if is_slow else None)
        except (httpx2.NetworkError, httpx2.RemoteProtocolError) as problem:
            budget.failed(self._shown(problem))
        except _Busy as busy:
            budget.failed(busy.problem, wait_s=busy.wait_s)
        except Unusable as problem:
            attempts = self.patience.slow_attempts if problem.slow else None
            budget.failed(str(problem), attempts=attempts, next_step=problem.next_step)
        except (httpx2.HTTPError, httpx2.InvalidURL) as problem:
            raise HubError(
                self.repository, f"{budget.what}: {self._shown(problem)}", next_step="Check HF_ENDPOINT and the proxy"
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
        from huggingface_hub import constants

        if constants.is_offline_mode():
            raise HubError(
                self.repository, f"{what}: not in the local cache, and HF_HUB_OFFLINE forbids requests",
                next_step="Unset HF_HUB_OFFLINE, or download it to the cache first",
            )  # fmt: skip
        linked: Mapping[str, str] | None = None
        for _ in range(1 + self.patience.redirects):
            request = session().stream(
                "GET",
                url,
                headers={**self._headers_for(url), "Accept-Encoding": "identity", **headers},
                follow_redirects=False,
                timeout=self._timeout_s,
                extensions={PATIENCE: self.patience},
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
        raise HubError(
            self.repository, f"{what}: more than {self.patience.redirects} redirects", next_step="Check HF_ENDPOINT"
        )

    def is_hub(self, url: str) -> bool:
        """Return whether a URL has the origin of the Hub, which is the only one that receives the token."""
        return origin(url) == origin(self.endpoint)

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
        reason = server_reason(response, self.budget(what))
        if status in RETRIED_STATUSES:
            wait_s = pause_asked_for(response, self.patience)
            raise _Busy(f"the server answers {status}" + (f" ({reason})" if reason else ""), wait_s)
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
        if str(problem).startswith(SLOW):
            return str(problem)
        text = {"ConnectError": f"no connection ({problem})", "RemoteProtocolError": f"invalid response ({problem})"}
        return kinds.get(name) or text.get(name) or f"the connection broke ({name})"


class _Busy(Exception):
    """A response that asks the client to come back later."""

    def __init__(self, problem: str, wait_s: float | None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.wait_s = wait_s
