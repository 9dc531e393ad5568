"""Settings of transfers from the Hub: sizes of requests and buffers, connections, and the budget of a request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Clock:
    """The time, so that tests of limits need none.

    Attributes:
        now: Returns the time in seconds since some moment.
        wait: Waits for an event for at most a number of seconds, and returns whether the event is set.
    """

    now: Callable[[], float] = time.monotonic
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait


SYSTEM_CLOCK = Clock()


@dataclass(frozen=True, slots=True)
class Patience:
    """Budget of a request to the Hub: attempts, time and bytes. `Budget` enforces it.

    A task is a small answer with all its attempts, all pages of a listing, or one byte range of a file. Only bytes that
    are kept count as progress. The default pauses are 0.2, 0.6, 1.8, 5.4, 16.2 and 20 s: they outlast the restart of a
    server, and a server that is down is reported within a minute.

    Attributes:
        attempts: Consecutive attempts without progress after which to give up.
        slow_attempts: The same for answers that arrive too slowly, since each of them takes `window_s`.
        first_wait_s: Pause after the first failure in seconds.
        factor: Factor by which each pause is longer than the one before.
        longest_wait_s: Longest pause in seconds.
        longest_asked_wait_s: Longest pause in seconds that a server may ask for.
        timeout_s: Time without data after which an attempt fails, in seconds. None uses the setting of huggingface_hub,
            HF_HUB_DOWNLOAD_TIMEOUT.
        window_s: Time in seconds for status and headers of an answer, and for every `progress_nbytes` of its body. The
            body of a small answer has this time in addition.
        progress_nbytes: Kept bytes that reset the count of failures. At the default, the slowest connection that works
            carries 2 kB/s. The default number of connections shares 17 kB/s.
        task_s: Time in seconds for a task with all its attempts and pauses, in addition to `window_s` for every
            `progress_nbytes` that it shall keep.
        answer_nbytes: Largest small answer in bytes.
        error_nbytes: Most bytes that are read of an error's body. Without the body, its status is reported alone.
        error_s: Time in seconds for the body of an error.
        redirects: Most redirects of one request.
        listing_pages: Most pages of a listing.
        listing_entries: Most files and directories of a listing.
        listing_nbytes: Most bytes of all pages of a listing.
        clock: The time.
    """

    attempts: int = 7
    slow_attempts: int = 3
    first_wait_s: float = 0.2
    factor: float = 3.0
    longest_wait_s: float = 20.0
    longest_asked_wait_s: float = 300.0
    timeout_s: float | None = None
    window_s: float = 30.0
    progress_nbytes: int = 2**16
    task_s: float = 1800.0
    answer_nbytes: int = 32 * 2**20
    error_nbytes: int = 2**16
    error_s: float = 5.0
    redirects: int = 5
    listing_pages: int = 1000
    listing_entries: int = 100_000
    listing_nbytes: int = 128 * 2**20
    clock: Clock = field(default=SYSTEM_CLOCK, compare=False)

    def wait_s(self, failures: int) -> float:
        """Return the pause in seconds after the given number of consecutive failures."""
        return float(min(self.first_wait_s * self.factor ** (failures - 1), self.longest_wait_s))


DEFAULT_PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class Transfer:
    """Limits of a transfer.

    Attributes:
        piece_nbytes: Size of one request in bytes. At the default, the time to the first byte does not matter.
        window_nbytes: Most bytes in memory that have been fetched but not used. Writing them to disk and reading them
            again would cost more than the conversion.
        connections: Parallel requests. The default is that of huggingface_hub.
        max_skipped_nbytes: Most bytes to discard before the requested range if a server sends the complete file. All
            attempts together discard at most twice as many.
        patience: Budget of a request.
    """

    piece_nbytes: int = 8 * 2**20
    window_nbytes: int = 128 * 2**20
    connections: int = 8
    max_skipped_nbytes: int = 64 * 2**20
    patience: Patience = DEFAULT_PATIENCE


DEFAULT_TRANSFER = Transfer()
