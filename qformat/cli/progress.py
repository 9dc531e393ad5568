"""Progress on stderr: one line in place on a terminal, and for training steps an occasional line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import click

from qformat.cli.display import duration, echo, terminal_width
from qformat.sizes import format_nbytes

COMPILING = "compiling kernels, once on this machine ..."
"""Why the first run on a machine takes longer."""

_SECONDS_BETWEEN_DRAWINGS = 0.1
_SECONDS_BETWEEN_LINES = 10.0


class StatusLine:
    """One line on stderr that is redrawn in place. It shows nothing if stderr is not a terminal."""

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self.is_drawn = False

    def show(self, text: str) -> None:
        """Replace the line, cut to the width of the terminal."""
        if self._on_terminal:
            # A character in the last column would make some terminals wrap.
            sys.stderr.write(f"\r{text[: terminal_width(sys.stderr) - 1]}\x1b[K")
            sys.stderr.flush()
            self.is_drawn = True

    def clear(self) -> None:
        """Erase the line, so that other output can take its place."""
        if self.is_drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self.is_drawn = False

    def keep(self) -> None:
        """Leave the line on the terminal and continue below it."""
        if self.is_drawn:
            click.echo(err=True)
            self.is_drawn = False


class Bar:
    """Progress of the phases of a command, one after the other. The line is cleared when a phase is done.

    The line shows the label of the phase, the percentage, the rate and the time left. Rate and time left follow from
    what was done since the first report of a phase, because an earlier run may have done the rest. Every method may be
    called from any thread.
    """

    def __init__(self) -> None:
        self._line = StatusLine()
        self._lock = threading.Lock()
        self._first: tuple[float, int] | None = None
        self._drawn_at = 0.0
        self._begin(0, "", "")

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._line.clear()

    def note(self, text: str) -> None:
        """Show what happens before there is anything to count, such as "Loading"."""
        with self._lock:
            self._begin(0, text, "")
            self._draw()

    def start(self, total: int, label: str) -> None:
        """Begin a phase that counts bytes.

        Args:
            total: Number of bytes of the phase.
            label: Short name of the phase.
        """
        self.start_steps(total, label, "")

    def start_steps(self, total: int, label: str, unit: str) -> None:
        """Begin a phase that counts steps.

        Args:
            total: Number of steps of the phase.
            label: Short name of the phase.
            unit: Name of one step, such as "layer".
        """
        with self._lock:
            self._begin(total, label, unit)
            self._draw()

    def advance(self, n: int) -> None:
        """Report that `n` more bytes or steps are done."""
        with self._lock:
            self._reach(self._done + n)

    def reach(self, done: int) -> None:
        """Report how many bytes or steps of the phase are done."""
        with self._lock:
            self._reach(done)

    def steps(self, label: str, unit: str) -> Callable[[int, int], None]:
        """Return a function that begins a phase at its first call and shows the steps that are done.

        Args:
            label: Short name of the phase.
            unit: Name of one step, such as "layer".

        Returns:
            A function of the number of steps that are done and the number of all steps.
        """
        begun = False

        def show(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                self.start_steps(total, label, unit)
                begun = True
            self.reach(done)

        return show

    def compiling(self) -> None:
        """Show that kernels are being compiled, until the next report. Does nothing if the line has been cleared."""
        with self._lock:
            if self._line.is_drawn:
                self._compiling = True
                self._draw()

    def clear(self) -> None:
        """Erase the line, so that other output can take its place."""
        with self._lock:
            self._line.clear()

    @contextmanager
    def while_compiling(self) -> Iterator[None]:
        """Show in this block when numba compiles a kernel, instead of loading it from its cache.

        Only a line that is shown is replaced, never output that has begun.
        """
        from numba.core.event import Event, Listener, install_listener

        bar = self

        class Compilation(Listener):
            def on_start(self, event: Event) -> None:
                bar.compiling()

            def on_end(self, event: Event) -> None: ...

        with install_listener("numba:compile", Compilation()):
            yield

    def _begin(self, total: int, label: str, unit: str) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._done = 0
        self._first = None
        self._compiling = False

    def _reach(self, done: int) -> None:
        if self._total == 0:
            return
        now = time.monotonic()
        self._done = done
        if self._first is None:
            self._first = (now, done)
        self._compiling = False
        if done >= self._total:
            self._line.clear()
        elif now - self._drawn_at >= _SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        if self._compiling:
            self._line.show(f"{self._label}: {COMPILING}")
            return
        if self._total == 0:
            self._line.show(f"{self._label} ...")
            return
        done, total = self._done, self._total
        amounts = f"{done}/{total} {self._unit}s" if self._unit else f"{format_nbytes(done)} of {format_nbytes(total)}"
        parts = [self._label, f"{min(done / total, 1):4.0%}", amounts]
        if self._first is not None and done > self._first[1] and self._drawn_at > self._first[0]:
            rate = (done - self._first[1]) / (self._drawn_at - self._first[0])
            parts += [self._in_words(rate), f"{duration(max(total - done, 0) / rate)} left"]
        if len("  ".join(parts)) >= terminal_width(sys.stderr):
            parts.remove(amounts)
        self._line.show("  ".join(parts))

    def _in_words(self, rate: float) -> str:
        """Return a rate per second, or the time of a step if that is longer than a second."""
        if not self._unit:
            return f"{format_nbytes(rate)}/s"
        return f"{rate:.1f} {self._unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{self._unit}"


class StepLines:
    """A line per training step on stderr: in place on a terminal, elsewhere at most one every ten seconds."""

    def __init__(self) -> None:
        self._line = StatusLine()
        self._in_place = sys.stderr.isatty()
        self._note = ""
        self._started: tuple[float, int] | None = None
        self._last_line_at = 0.0

    def __enter__(self) -> StepLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    def note(self, text: str) -> None:
        """Show what happens until the first step, such as "Preparing". Only on a terminal."""
        self._note = f"{text} ..."
        self._line.show(self._note)

    def say(self, text: str) -> None:
        """Print a line of its own. A step that is shown in place stays above it."""
        self.finish()
        echo(text, err=True)
        if self._note:
            self._line.show(self._note)

    def step(self, step: int, n_steps: int, text: Callable[[], str]) -> None:
        """Show that a step is done, with the time left.

        Args:
            step: Number of the step, from 1.
            n_steps: Number of all steps.
            text: Makes the text of the line. Not called for steps that are not shown.
        """
        now = time.monotonic()
        first = self._started is None
        if self._started is None:
            self._started = (now, step)
            self._note = ""
        if not (self._in_place or first or step == n_steps or now - self._last_line_at >= _SECONDS_BETWEEN_LINES):
            return
        self._last_line_at = now
        first_time, first_step = self._started
        line = f"step {step}/{n_steps}  {text()}"
        if step > first_step:
            line += f"  {duration((now - first_time) / (step - first_step) * (n_steps - step))} left"
        if not self._in_place:
            click.echo(line, err=True)
            return
        self._line.show(line)
        if step == n_steps:
            self._line.keep()

    def finish(self) -> None:
        """Keep the last step on the terminal and erase a note, so that other output can follow."""
        if self._started is None:
            self._line.clear()
        else:
            self._line.keep()
