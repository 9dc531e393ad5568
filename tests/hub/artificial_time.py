"""An artificial clock: pauses and trickling servers take no real time."""

from __future__ import annotations

import threading
from dataclasses import replace

from qformat.hub.reading.transfer import Clock, Transfer
from tests.hub.conftest import PATIENT


class ArtificialTime:
    """Time in seconds that passes only if it is told to, or if somebody waits."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waits: list[float] = []

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        self.seconds += seconds
        return event.is_set()

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.seconds, self.wait)

    def patient(self, **limits: float) -> Transfer:
        """Return the settings of the other tests with this clock and other limits."""
        return replace(PATIENT, patience=replace(PATIENT.patience, clock=self.clock, **limits))  # type: ignore[arg-type]
