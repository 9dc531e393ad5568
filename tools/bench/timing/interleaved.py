"""Measures several sides in turn within each round, so that other load on the machine hardly distorts their ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

Call = Callable[[], object]


def time_in_turn(calls: Mapping[str, Call], *, rounds: int, window_s: float = 0.02) -> dict[str, list[float]]:
    """Return the seconds per call of each side, one value per round. Each side runs for about `window_s` in a round."""
    repeats = {name: _repeats(call, window_s) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # untimed: warms caches and threads for this side
            times[name].append(_seconds(call, repeats[name]))
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of one side's value divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _repeats(call: Call, window_s: float) -> int:
    """Return how many calls fill the window, ignoring the first call, which compiles kernels and fills caches."""
    call()
    return max(1, math.ceil(window_s / max(_seconds(call, 1), 1e-9)))


def _seconds(call: Call, repeats: int) -> float:
    started = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - started) / repeats
