"""Runs each side as a separate process that takes steps on request, in turn, and measures time and peak memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of each round, and peak memory in bytes."""

    seconds: list[float]
    peak_nbytes: int


def start_side(module: str, arguments: list[str], *, quiet: bool = False) -> subprocess.Popen[str]:
    """Start a module as a side, which must call `serve_steps`. `quiet` hides its standard error."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
    )


def step_in_turn(processes: Mapping[str, subprocess.Popen[str]], *, rounds: int, warm_up: int) -> dict[str, Figures]:
    """Let all sides take their steps in turn, then end them. The first `warm_up` steps fill caches and do not count."""
    seconds: dict[str, list[float]] = {side: [] for side in processes}
    for number in range(rounds + warm_up):
        for side, process in processes.items():
            told = float(_ask(process, "step"))
            if number >= warm_up:
                seconds[side].append(told)
    figures = {}
    for side, process in processes.items():
        figures[side] = Figures(seconds[side], int(_ask(process, "peak")))
        process.communicate()
    return figures


def serve_steps(step: Callable[[], object], *, nbytes_before: int) -> None:
    """Take steps on request, and at the end report the peak memory minus `nbytes_before`."""
    for line in sys.stdin:
        if line.strip() == "peak":
            print(peak_nbytes() - nbytes_before, flush=True)
            return
        started = perf_counter()
        step()
        print(perf_counter() - started, flush=True)


def peak_nbytes() -> int:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ask(process: subprocess.Popen[str], what: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f"{process.args}: ended unexpectedly")
    return answer
