"""How many cores this process may use: the default number of worker threads everywhere."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return one for each core that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
