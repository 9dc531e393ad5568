"""How the threads of torch's OpenMP team wait for each other, chosen before torch is loaded.

By default they spin for milliseconds, which is fastest as long as every thread has a core. Beside one busy process one
of them has none, and the others spin away the time that it would need. Measured on two cores: a training step of 0.2 s
took 4 to 12 s beside several busy processes, and 0.3 to 0.8 s with threads that sleep. On a quiet machine sleeping
costs a tenth of the speed (45 tokens a second become 41), so it is chosen only where other programs are at work.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""The user's own choice, which is left alone."""

_LOAD = Path("/proc/loadavg")
_LOOKS = 3
_PAUSE_S = 0.002


def choose_how_to_wait() -> None:
    """Let this process and its children wait asleep if other programs use the cores now."""
    if not any(name in os.environ for name in CHOICES) and others_are_running():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def others_are_running() -> bool:
    """Whether another program runs at each of a few looks. False where Linux does not tell.

    What ran over the last minute does not count: on a quiet machine it is the command before this one.
    """
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_S)  # what only starts or ends beside us is gone by then
        try:
            running = _LOAD.read_text().split()[3]
        except OSError:
            return False
        if int(running.split("/")[0]) <= 1:  # this process is the one that runs
            return False
    return True
