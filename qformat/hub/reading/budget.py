"""The budget of a task: it counts attempts, time and bytes, and gives up when one of them is spent.

    budget.failed("the server answers 503")    waits before the next attempt, or raises HubError
    budget.begin_answer()                      a response begins
    budget.keep(nbytes)                        bytes of it were kept: enough of them reset the count of failures
    budget.discard(nbytes)                     bytes of it were thrown away: which is not progress

The limits are those of `Patience`. `wire` bounds the time that passes inside the HTTP client.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from qformat.errors import HubError, Words
from qformat.hub.reading.transfer import Patience
from qformat.secrets import masked

_log = logging.getLogger(__name__)

_WORTH_TELLING_S = 1.0
"""Shortest pause that is reported to the user, because the progress bar would seem to hang."""

PATIENCE = "qformat.patience"
"""Name of the extension of a request with the `Patience` that applies to it."""

SLOW = "only"
"""First word of the message of a timeout because an answer arrives too slowly."""

CHECK_CONNECTION: Words = ("Check the connection. The same command resumes where this one stopped",)


class Unusable(Exception):
    """A response that cannot be used, although the next one may be usable. It does not leave this package.

    Args:
        problem: What is wrong with the response.
        next_step: What the user can do if all further responses are unusable too.
        slow: The response arrived too slowly.
    """

    def __init__(self, problem: str, *, next_step: Words = CHECK_CONNECTION, slow: bool = False) -> None:
        super().__init__(problem)
        self.next_step = next_step
        self.slow = slow


@dataclass(slots=True)
class Budget:
    """What one task may still cost. It belongs to one thread.

    Attributes:
        repository: Repository of the request, for messages.
        what: The task, for messages.
        patience: The limits.
        nbytes: Number of bytes that the task shall keep. They take time in addition to that of every task.
        max_discarded_nbytes: Most bytes to throw away.
        closing: Event that ends a pause early.
    """

    repository: str
    what: str
    patience: Patience
    nbytes: int = 0
    max_discarded_nbytes: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    _started: float = field(init=False)
    _window: float = field(init=False)
    _failures: int = field(default=0, init=False)
    _kept: int = field(default=0, init=False)
    _received: int = field(default=0, init=False)
    _discarded: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._started = self._window = self.patience.clock.now()

    def begin_answer(self) -> None:
        """Note that a response begins: what it keeps is counted from now on."""
        self._window = self.patience.clock.now()
        self._received = 0

    def answered(self) -> None:
        """Note that a small answer is complete, which resets the count of failures."""
        self._failures = 0

    def keep(self, nbytes: int) -> None:
        """Count bytes of a response that are kept. Enough of them reset the count of failures.

        Raises:
            Unusable: The response is too slow.
            HubError: The task takes too long.
        """
        self._kept += nbytes
        if self._kept >= self.patience.progress_nbytes:
            self._kept, self._failures, self._window = 0, 0, self.patience.clock.now()
        self._received += nbytes
        self._refuse_slow(f"{SLOW} {self._received} bytes arrived")

    def discard(self, nbytes: int) -> None:
        """Count bytes of a response that are thrown away.

        Raises:
            Unusable: The response is too slow.
            HubError: Too many bytes have been thrown away, or the task takes too long.
        """
        if nbytes == 0:
            return
        self._discarded += nbytes
        if self._discarded > self.max_discarded_nbytes:
            raise self._spent(f"the server sent {self._discarded} bytes that nobody asked for")
        self._refuse_slow("no requested bytes arrived")

    def take_small(self, nbytes: int, *, max_nbytes: int, within_s: float | None = None) -> None:
        """Count bytes of a small answer.

        Args:
            nbytes: Bytes of the answer so far.
            max_nbytes: Largest accepted answer in bytes.
            within_s: Time for the whole answer in seconds. The default is `window_s`, and as much again for every
                `progress_nbytes`.

        Raises:
            Unusable: The answer is too slow.
            HubError: The answer is too large, or the task takes too long.
        """
        if nbytes > max_nbytes:
            raise HubError(
                self.repository, f"{self.what}: the response has more than {max_nbytes} bytes",
                next_step="Check HF_ENDPOINT",
            )  # fmt: skip
        if within_s is None:
            within_s = self.patience.window_s * (1 + nbytes / self.patience.progress_nbytes)
        self._refuse_slow(f"{SLOW} {nbytes} bytes arrived", within_s=within_s)

    def failed(
        self,
        problem: str,
        *,
        attempts: int | None = None,
        wait_s: float | None = None,
        next_step: Words = CHECK_CONNECTION,
    ) -> None:
        """Wait before the next attempt, or give up.

        Args:
            problem: What failed.
            attempts: Consecutive failures after which to give up. The default is that of `patience`.
            wait_s: Pause in seconds. The default is that of `patience`.
            next_step: What the user can do.

        Raises:
            HubError: Too many attempts have failed, the task takes too long, or the transport was closed.
        """
        self._failures += 1
        if self._failures >= min(attempts or self.patience.attempts, self.patience.attempts):
            raise HubError(
                self.repository, f"{self.what}: {problem}, {self._failures} times in a row", next_step=next_step
            )
        pause = self.patience.wait_s(self._failures) if wait_s is None else wait_s
        if self._age() + pause > self._limit_s():
            raise self._spent(problem)
        level = logging.WARNING if pause >= _WORTH_TELLING_S else logging.INFO
        _log.log(level, "%s: %s: %s; retrying in %.1f s", self.repository, self.what, masked(problem), pause)
        if self.patience.clock.wait(self.closing, pause):
            raise HubError(self.repository, f"{self.what}: stopped", next_step="The same command resumes it")

    def _refuse_slow(self, problem: str, *, within_s: float | None = None) -> None:
        seconds = self.patience.clock.now() - self._window
        if seconds > (self.patience.window_s if within_s is None else within_s):
            raise Unusable(f"{problem} in {seconds:.0f} s", slow=True)
        if self._age() > self._limit_s():
            raise self._spent(problem)

    def _age(self) -> float:
        return self.patience.clock.now() - self._started

    def _limit_s(self) -> float:
        return self.patience.task_s + self.patience.window_s * self.nbytes / self.patience.progress_nbytes

    def _spent(self, problem: str) -> HubError:
        return HubError(
            self.repository, f"{self.what}: given up after {self._age():.0f} s: {problem}", next_step=CHECK_CONNECTION
        )
