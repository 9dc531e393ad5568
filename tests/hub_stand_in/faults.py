"""What the stand-in does wrong on purpose."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "status",  # answer `status` (503), do nothing else; `headers` are added (Retry-After, X-Error-Message)
    "drop",  # close the connection, do nothing else
    "lose",  # carry the request out, then close the connection without an answer
    "slow",  # wait `seconds` before the answer
    "cut",  # announce the whole body, close the connection after `nbytes` of it
    "stall",  # send `nbytes` of the body, wait `seconds`, close the connection
    "flip",  # change one bit of the body's byte `nbytes`
    "whole",  # answer 200 and the whole file to a request for a range
    "no_content_range",  # answer 206 without Content-Range
    "wrong_content_range",  # answer 206 with a Content-Range that begins a byte later
    "short_range",  # answer 206 with half of the range, and a Content-Range that says so
    "call",  # call `hook` before the request is carried out
]


@dataclass
class Fault:
    """One fault: what, on which requests, how often."""

    kind: Kind
    route: str = ""
    """A regular expression that is searched in `METHOD SERVER/path?query` (SERVER is hub or cdn)."""
    every: int = 1
    """Of the requests that match, each n-th."""
    times: int | None = None
    """At most so often; None is for ever."""
    after: int = 0
    """Leave the first matching requests alone."""
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0
    hook: Callable[[], None] | None = None
    n_matched: int = 0
    n_done: int = 0

    def strikes(self, request_line: str) -> bool:
        """Count a request and tell whether the fault hits it."""
        if re.search(self.route, request_line) is None or (self.times is not None and self.n_done >= self.times):
            return False
        self.n_matched += 1
        if self.n_matched <= self.after or (self.n_matched - self.after) % self.every:
            return False
        self.n_done += 1
        return True


class Faults:
    """The faults that are switched on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, kind: Kind, **switches: object) -> Fault:
        """Switch a fault on; the fields of `Fault` by name."""
        fault = Fault(kind, **switches)  # type: ignore[arg-type]
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def of(self, request_line: str) -> list[Fault]:
        """Return the faults that hit this request; each counts it."""
        with self._lock:
            return [fault for fault in self._faults if fault.strikes(request_line)]
