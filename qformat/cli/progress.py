"""How far a command is: bars over bytes and windows, and lines over steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import click

from qformat.cli.display import duration, progress_bar, step_bar

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """A bar that begins once it is known how much there is to do. A new one ends the one before.

    It shows nothing where stderr is no terminal.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._advance: Callable[[int], None] = lambda n: None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def start(self, total: int, description: str) -> None:
        """Begin to count `total` bytes."""
        self._open.close()
        self._advance = self._open.enter_context(progress_bar(total, description))

    def start_steps(self, total: int, description: str, unit: str) -> None:
        """Begin to count steps; `advance` then takes how many are done."""
        self._open.close()
        self._advance = self._open.enter_context(step_bar(total, description, unit))

    def advance(self, n: int) -> None:
        """Count `n` more."""
        self._advance(n)


class StepLines:
    """A line a step: on a file or pipe at most every ten seconds, on a terminal one line in place. All on stderr."""

    def __init__(self) -> None:
        self._started: tuple[float, int] | None = None
        self._told = 0.0
        self._in_place = sys.stderr.isatty()
        self._dirty = False

    def say(self, text: str) -> None:
        """Print a sentence."""
        self._end_line()
        click.echo(text, err=True)

    def step(self, step: int, n_steps: int, text: Callable[[], str]) -> None:
        """Tell that a step is done. text: makes the line; the time that is left is added."""
        now = time.monotonic()
        first = self._started is None
        if self._started is None:
            self._started = (now, step)
        if not (self._in_place or first or step == n_steps or now - self._told >= _SECONDS_BETWEEN_LINES):
            return
        self._told = now
        first_time, first_step = self._started
        line = f"step {step}/{n_steps}  {text()}"
        if step > first_step:
            line += f"  {duration((now - first_time) / (step - first_step) * (n_steps - step))} left"
        click.echo(f"\r\x1b[K{line}" if self._in_place else line, err=True, nl=not self._in_place)
        self._dirty = self._in_place
        if step == n_steps:
            self._end_line()

    def _end_line(self) -> None:
        if self._dirty:
            click.echo(err=True)
        self._dirty = False
