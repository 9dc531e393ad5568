"""Chooses how the threads of torch's OpenMP team wait for each other, before torch is loaded.

By default they spin for milliseconds, which is fastest if every thread has a core. Beside another busy process, one
thread has no core while the others spin away the time it needs. Measured on two cores: a training step of 0.2 s took 4
to 12 s beside several busy processes, and 0.3 to 0.8 s with threads that sleep. On an idle machine, sleeping costs a
tenth of the speed (41 instead of 45 tokens/s), so it is chosen only if other programs are running.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables with which users choose. If one is set, this module changes nothing."""

_LOAD = Path("/proc/loadavg")
_LOOKS = 3
_PAUSE_S = 0.002


def choose_how_to_wait() -> None:
    """Let the threads of this process and its children sleep while they wait, if other programs use the cores now."""
    if not any(name in os.environ for name in CHOICES) and others_are_running():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def others_are_running() -> bool:
    """Return whether another program is running at each of a few samples. False without Linux's /proc.

    The load average of the last minute is not used: on an idle machine it shows the command before this one.
    """
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_S)  # ignores processes that only start or end
        try:
            running = _LOAD.read_text().split()[3]
        except OSError:
            return False
        if int(running.split("/")[0]) <= 1:  # this process is the one that runs
            return False
    return True
