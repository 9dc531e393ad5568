"""Times of several sides, taken in turn within each round, and their ratios: what a busy machine distorts least."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

Call = Callable[[], object]


def time_in_turn(calls: Mapping[str, Call], *, rounds: int, window_s: float = 0.02) -> dict[str, list[float]]:
    """Return seconds a call, one figure a round, of each side. In a round every side runs for about `window_s`."""
    repeats = {name: _repeats(call, window_s) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # not timed: brings caches and threads back to this side
            times[name].append(_seconds(call, repeats[name]))
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of one side's figure divided by another's of the same round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _repeats(call: Call, window_s: float) -> int:
    """Return how many calls fill the window. The first calls, which compile and fill caches, are not looked at."""
    call()
    return max(1, math.ceil(window_s / max(_seconds(call, 1), 1e-9)))


def _seconds(call: Call, repeats: int) -> float:
    started = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - started) / repeats
