"""Progress on stderr: one line in place on a terminal, and for training steps an occasional line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from qformat.cli.display import duration, echo, echo_layout, terminal_width
from qformat.printable import shown
from qformat.sizes import format_nbytes

if TYPE_CHECKING:
    from tqdm import tqdm

    Line = tqdm[NoReturn]

COMPILING = "compiling kernels, once on this machine ..."
"""Why the first run on a machine takes longer."""

_NOTE = "{desc} ..."
_COUNT = "{desc}  {percentage:3.0f}%{figures}"
_COMPILATION = "{desc}: " + COMPILING
_SECONDS_BETWEEN_LINES = 10.0


@cache
def _line_type() -> type[Line]:
    """Return tqdm with sizes, rate and time as the other output of the commands shows them."""
    from tqdm import tqdm  # here, so that `qformat --help` does not load it
    from tqdm.utils import disp_trim

    class UnitLine(tqdm):  # type: ignore[type-arg]
        """tqdm with the field `figures` for its `bar_format`, cut to the width of the terminal."""

        monitor_interval = 0  # no thread that watches the line: every report may redraw it

        @property
        def format_dict(self) -> MutableMapping[str, Any]:
            facts = super().format_dict
            if self.total:
                columns = self._columns() - len(f"{self.desc}  100%")
                facts["figures"] = _figures(self.n, self.total, self.initial, facts["elapsed"], self.unit, columns)
            return facts

        def __str__(self) -> str:
            return disp_trim(super().__str__(), self._columns())

        def _columns(self) -> int:
            # A character in the last column would make some terminals wrap.
            return terminal_width(sys.stderr) - 1

    return UnitLine


def _open_line(desc: str, bar_format: str, *, total: int | None = None, unit: str = "B") -> Line:
    """Draw a line on stderr that is redrawn in place and erased when it is closed. Nothing if it is not a terminal."""
    return _line_type()(
        desc=shown(desc),
        bar_format=bar_format,
        total=total,
        unit=unit,
        ncols=terminal_width(sys.stderr),
        nrows=20,  # tqdm draws nothing if the terminal reports no size
        leave=False,
        disable=None,
        miniters=1,
        smoothing=0,  # the average since the first report: a steady estimate
    )


def _figures(n: float, total: float, initial: float, elapsed: float, unit: str, columns: int) -> str:
    """Return amounts, rate and time left, without the amounts if there are not enough columns."""
    figures = [f"  {format_nbytes(n)} of {format_nbytes(total)}" if unit == "B" else f"  {n}/{total} {unit}s"]
    if n > initial and elapsed > 0:
        rate = (n - initial) / elapsed
        figures += [f"  {_rate(rate, unit)}", f"  {duration((total - n) / rate)} left"]
    return "".join(figures if len("".join(figures)) <= columns else figures[1:])


def _rate(rate: float, unit: str) -> str:
    """Return a rate per second, or the time of a step if that is longer than a second."""
    if unit == "B":
        return f"{format_nbytes(rate)}/s"
    return f"{rate:.1f} {unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit}"


class Bar:
    """Progress of the phases of a command, one after the other, drawn by tqdm. A line is erased when its phase is done.

    The line shows the label of the phase, the percentage, the rate and the time left. Rate and time left follow from
    what was done since the first report of a phase, because an earlier run may have done the rest. Every method may be
    called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: Line | None = None
        self._reported = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()

    def note(self, text: str) -> None:
        """Show what happens before there is anything to count, such as "Loading"."""
        with self._lock:
            self._close()
            self._line = _open_line(text, _NOTE)

    def start(self, total: int, label: str) -> None:
        """Begin a phase that counts bytes.

        Args:
            total: Number of bytes of the phase.
            label: Short name of the phase.
        """
        self.start_steps(total, label, "B")

    def start_steps(self, total: int, label: str, unit: str) -> None:
        """Begin a phase that counts steps.

        Args:
            total: Number of steps of the phase.
            label: Short name of the phase.
            unit: Name of one step, such as "layer".
        """
        with self._lock:
            self._close()
            self._line = _open_line(label, _COUNT if total else _NOTE, total=total, unit=unit)
            self._reported = False

    def advance(self, n: int) -> None:
        """Report that `n` more bytes or steps are done."""
        with self._lock:
            if self._line is not None:
                self._reach(self._line, self._line.n + n)

    def reach(self, done: int) -> None:
        """Report how many bytes or steps of the phase are done."""
        with self._lock:
            if self._line is not None:
                self._reach(self._line, done)

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
            if self._line is not None:
                self._line.bar_format = _COMPILATION
                self._line.refresh()

    def clear(self) -> None:
        """Erase the line, so that other output can take its place."""
        with self._lock:
            self._close()

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

    def _reach(self, line: Line, done: float) -> None:
        if not line.total:
            return
        if done >= line.total:
            self._close()
            return
        line.bar_format = _COUNT
        if not self._reported:
            # tqdm measures from here on.
            line.initial, line.start_t = done, time.time()
            self._reported = True
        line.update(done - line.n)

    def _close(self) -> None:
        if self._line is not None:
            # tqdm takes a line for never drawn, and does not erase it, if its last drawing is older than its start.
            if not self._line.disable:
                self._line.last_print_t = max(self._line.last_print_t, self._line.start_t)
            self._line.close()
            self._line = None


class StepLines:
    """A line per training step on stderr: in place on a terminal, elsewhere at most one every ten seconds."""

    def __init__(self) -> None:
        self._line: Line | None = None
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
        self._show(self._note)

    def say(self, text: str) -> None:
        """Print a line of its own. A step that is shown in place stays above it."""
        self.finish()
        echo(text, err=True)
        if self._note:
            self._show(self._note)

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
            echo_layout(line, err=True)
            return
        self._show(line)
        if step == n_steps:
            self.finish()

    def finish(self) -> None:
        """Keep the last step on the terminal and erase a note, so that other output can follow."""
        if self._line is not None:
            self._line.leave = self._started is not None
            self._line.close()
            self._line = None

    def _show(self, text: str) -> None:
        if self._line is None:
            self._line = _open_line(text, "{desc}")
        else:
            self._line.set_description_str(shown(text))
