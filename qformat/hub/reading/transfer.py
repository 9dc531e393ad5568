"""Settings of transfers from the Hub: sizes of requests and buffers, parallel connections, and retries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """Retries of a request.

    The default pauses are 0.2, 0.6, 1.8, 5.4, 16.2 and 20 s. They outlast the restart of a server, and a server that
    is down is reported within a minute.

    Attributes:
        attempts: Consecutive attempts without progress after which to give up.
        first_wait_s: Pause after the first failure in seconds.
        factor: Factor by which each pause is longer than the one before.
        longest_wait_s: Longest pause in seconds.
        timeout_s: Time without data after which an attempt fails, in seconds. None uses the setting of huggingface_hub,
            HF_HUB_DOWNLOAD_TIMEOUT.
    """

    attempts: int = 7
    first_wait_s: float = 0.2
    factor: float = 3.0
    longest_wait_s: float = 20.0
    timeout_s: float | None = None

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
        max_skipped_nbytes: Most bytes to discard before the requested range if a server sends the complete file.
        patience: Retries of a request.
    """

    piece_nbytes: int = 8 * 2**20
    window_nbytes: int = 128 * 2**20
    connections: int = 8
    max_skipped_nbytes: int = 64 * 2**20
    patience: Patience = DEFAULT_PATIENCE


DEFAULT_TRANSFER = Transfer()
