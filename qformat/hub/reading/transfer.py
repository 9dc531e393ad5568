"""How bytes come from the Hub: the sizes of requests and buffers, how many at a time, and how often they are tried."""

from __future__ import annotations

from dataclasses import dataclass


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
class Transfer:
    """What a transfer may take.

    piece_nbytes: bytes of one request, long enough that the time to the first byte does not matter.
    window_nbytes: bytes that are fetched and not yet used. They stay in memory: they are needed within a second, and
    writing them to a disk and reading them again would cost more than the whole conversion.
    connections: requests in flight, as many as huggingface_hub's own downloads have.
    max_skipped_nbytes: of a whole file that is sent instead of a range, what lies before the range and is read for
    nothing.
    """

    piece_nbytes: int = 8 * 2**20
    window_nbytes: int = 128 * 2**20
    connections: int = 8
    max_skipped_nbytes: int = 64 * 2**20
    patience: Patience = DEFAULT_PATIENCE


DEFAULT_TRANSFER = Transfer()
