"""Bounds the time of an answer inside the HTTP client, which by itself limits only the time without data.

A server that sends one byte of a header at a time, or interim responses without end, never meets a timeout of the
client. `bound` lets every connection of a client ask, before each read, how much time is left for the answer:

    request hook  ──► the answer may take `timeout_s`, then `window_s` for status and headers
    response hook ──► its body may take `window_s`, and as much again for every `progress_nbytes`

Both hooks and all reads of an answer run in the thread that sent the request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpcore2
import httpx2

from qformat.hub.reading.budget import PATIENCE, SLOW
from qformat.hub.reading.transfer import DEFAULT_PATIENCE, Patience

if TYPE_CHECKING:
    import ssl


@dataclass(slots=True)
class _Answer:
    """Time and bytes of the answer that a thread waits for."""

    patience: Patience
    began: float | None = None
    nbytes: int = 0
    in_body: bool = False

    def left_s(self, timeout: float | None) -> float | None:
        """Return the time that the next read may take, in seconds."""
        now = self.patience.clock.now()
        if self.began is None:  # the server works on the request
            return timeout
        windows = 1 + (self.nbytes / self.patience.progress_nbytes if self.in_body else 0)
        left = self.began + self.patience.window_s * windows - now
        if left <= 0:
            raise httpcore2.ReadTimeout(f"{SLOW} {self.nbytes} bytes arrived in {now - self.began:.0f} s")
        return left if timeout is None else min(timeout, left)

    def came(self, nbytes: int) -> None:
        self.nbytes += nbytes
        if self.began is None:
            self.began = self.patience.clock.now()


_current = threading.local()


class _Stream(httpcore2.NetworkStream):
    """A connection that reads within the time of the current answer."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        answer: _Answer | None = getattr(_current, "answer", None)
        if answer is None:
            return self._stream.read(max_bytes, timeout)
        try:
            data = self._stream.read(max_bytes, answer.left_s(timeout))
        except httpcore2.ReadTimeout:
            answer.left_s(timeout)  # raises if the time of the whole answer has passed
            raise
        answer.came(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore2.NetworkBackend):
    def __init__(self, backend: httpcore2.NetworkBackend) -> None:
        self._backend = backend

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        return _Stream(self._backend.connect_tcp(host, port, timeout, local_address, socket_options))

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._backend.connect_unix_socket(path, timeout, socket_options))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


def bound(client: httpx2.Client) -> httpx2.Client:
    """Bound the time of all answers to a client. Other settings of the client, such as proxies, stay."""
    for transport in {client._transport, *client._mounts.values()}:
        pool = getattr(transport, "_pool", None)  # httpx2 does not pass a backend on to httpcore2
        if pool is not None:
            pool._network_backend = _Backend(pool._network_backend)
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], _asked], "response": [_began_body, *hooks["response"]]}
    return client


def _asked(request: httpx2.Request) -> None:
    _current.answer = _Answer(request.extensions.get(PATIENCE, DEFAULT_PATIENCE))


def _began_body(response: httpx2.Response) -> None:
    answer: _Answer = _current.answer
    answer.began, answer.nbytes, answer.in_body = answer.patience.clock.now(), 0, True


class _Limited(httpx2.SyncByteStream):
    """The body of a response with a size limit."""

    def __init__(self, stream: httpx2.SyncByteStream, max_nbytes: int, too_large: Callable[[], Exception]) -> None:
        self._stream = stream
        self._left = max_nbytes
        self._too_large = too_large

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._left -= len(chunk)
            if self._left < 0:
                raise self._too_large()
            yield chunk

    def close(self) -> None:
        self._stream.close()


def limit_size(response: httpx2.Response, max_nbytes: int, too_large: Callable[[], Exception]) -> None:
    """Limit the size of the body of a response that has not been read.

    Args:
        response: The response.
        max_nbytes: Largest accepted body in bytes.
        too_large: Returns the error to raise for a larger one.
    """
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _Limited(response.stream, max_nbytes, too_large)


class _Changed(httpx2.SyncByteStream):
    """The body of a small response after a change."""

    def __init__(self, stream: httpx2.SyncByteStream, change: Callable[[bytes], bytes]) -> None:
        self._stream = stream
        self._change = change

    def __iter__(self) -> Iterator[bytes]:
        yield self._change(b"".join(self._stream))

    def close(self) -> None:
        self._stream.close()


def change_body(response: httpx2.Response, change: Callable[[bytes], bytes]) -> None:
    """Change the body of a small response that has not been read.

    Args:
        response: The response.
        change: Returns the body to use.
    """
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _Changed(response.stream, change)
