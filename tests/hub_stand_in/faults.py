"""Deliberate faults of the stand-in."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "status",  # answer `status` (503), with `headers` such as Retry-After and `nbytes` spaces, and do nothing else
    "drop",  # close the connection and do nothing else
    "lose",  # execute the request, then close the connection without a response
    "slow",  # wait `seconds` before the response
    "cut",  # announce the complete body, close the connection after `nbytes` of it
    "stall",  # send `nbytes` of the body, wait `seconds`, close the connection
    "flip",  # flip one bit of byte `nbytes` of the body
    "whole",  # answer a request for a range with 200 and the complete file
    "no_content_range",  # answer 206 without Content-Range
    "wrong_content_range",  # answer 206 with a Content-Range that starts one byte later
    "short_range",  # answer 206 with half of the range and the matching Content-Range
    "call",  # call `hook` before the request is executed
    "trickle",  # send the body one byte at a time, call `hook` after each, and go on with spaces
    "trickle_headers",  # the same with headers
    "interim",  # send interim responses (100 Continue) without end, call `hook` after each
    "wrong_length",  # announce `nbytes` more than the body has
    "gzip",  # answer 200 and `nbytes` zeros, compressed although nobody asked for it
    "html",  # answer 200 and a web page
    "endless_pages",  # answer a page of a listing with one new directory, and the link to another page
    "same_page",  # add the link to the same page
]


@dataclass
class Fault:
    """One fault: its kind, the requests that it affects, and how often."""

    kind: Kind
    route: str = ""
    """A regular expression that is searched in `METHOD SERVER/path?query` (SERVER is hub or cdn)."""
    every: int = 1
    """Affect every n-th matching request."""
    times: int | None = None
    """Largest number of affected requests, or None for no limit."""
    after: int = 0
    """Number of matching requests to skip first."""
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0
    hook: Callable[[], None] | None = None
    n_matched: int = 0
    n_done: int = 0

    def strikes(self, request_line: str) -> bool:
        """Count a request and return whether the fault affects it."""
        if re.search(self.route, request_line) is None or (self.times is not None and self.n_done >= self.times):
            return False
        self.n_matched += 1
        if self.n_matched <= self.after or (self.n_matched - self.after) % self.every:
            return False
        self.n_done += 1
        return True


class Faults:
    """The active faults."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, kind: Kind, **switches: object) -> Fault:
        """Activate a fault, given by the fields of `Fault`."""
        fault = Fault(kind, **switches)  # type: ignore[arg-type]
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def of(self, request_line: str) -> list[Fault]:
        """Return the faults that affect a request, and count it for each."""
        with self._lock:
            return [fault for fault in self._faults if fault.strikes(request_line)]
