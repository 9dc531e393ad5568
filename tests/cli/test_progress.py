"""Progress: one line in place on a terminal, nothing or an occasional line elsewhere."""

from __future__ import annotations

import io
import sys

import numba
import pytest

from qformat.cli.progress import Bar, StepLines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr("qformat.cli.progress.time", moved)
    monkeypatch.setattr("tqdm.std.time", moved.time)
    return moved


def steps(lines: StepLines, clock: Clock, *, n: int, seconds: float) -> None:
    for step in range(1, n + 1):
        lines.step(step, n, lambda step=step: f"loss {step}")  # type: ignore[misc]
        clock.now += seconds


def test_a_pipe_gets_the_first_and_last_step_and_one_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(StepLines(), clock, n=9, seconds=4.0)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in shown] == ["1/9", "4/9", "7/9", "9/9"]
    assert shown[0] == "step 1/9  loss 1"
    assert shown[1] == "step 4/9  loss 4  0:20 left"


def test_a_terminal_gets_every_step_in_place_and_sentences_on_lines_of_their_own(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch)
    lines = StepLines()
    lines.step(1, 3, lambda: "loss 1")
    lines.say("evaluation")
    steps(lines, clock, n=3, seconds=0.1)
    assert [line for line in drawn(terminal) if line] == [
        "step 1/3  loss 1",
        "step 1/3  loss 1\nevaluation\n",
        "step 1/3  loss 1",
        "step 2/3  loss 2  0:00 left",
        "step 3/3  loss 3  0:00 left",
        "step 3/3  loss 3  0:00 left\n",
    ]


def on_terminal(monkeypatch: pytest.MonkeyPatch, *, columns: int = 80) -> Terminal:
    """Put a terminal in the place of stderr. Not a fixture: pytest replaces stderr again after the set-up."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    return terminal


def drawn(terminal: Terminal) -> list[str]:
    """Return what the line showed, one drawing after the other; an erased line is empty."""
    lines = [part.rstrip(" ") for part in terminal.getvalue().split("\r")[1:]]
    return [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]


def test_a_bar_shows_percentage_rate_and_time_left_and_is_cleared(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch)
    with Bar() as bar:
        bar.note("Loading")
        bar.start(400_000_000, "Converting")
        clock.now += 1
        bar.advance(100_000_000)  # the first report: an earlier run may have done it
        clock.now += 2
        bar.advance(100_000_000)
        clock.now += 0.01
        bar.advance(1_000_000)  # too early to draw again
        clock.now += 4
        bar.advance(199_000_000)
        bar.start_steps(12, "Calibrating", "layer")
        clock.now += 1
        bar.reach(2)
        clock.now += 20
        bar.reach(7)
    assert drawn(terminal) == [
        "Loading ...",
        "",
        "Converting    0%  0 B of 400 MB",
        "Converting   25%  100 MB of 400 MB",
        "Converting   50%  200 MB of 400 MB  50 MB/s  0:04 left",
        "",
        "Calibrating    0%  0/12 layers",
        "Calibrating   17%  2/12 layers",
        "Calibrating   58%  7/12 layers  4.0 s/layer  0:20 left",
        "",
    ]


@pytest.mark.parametrize("columns", [20, 40, 60, 80])
def test_a_bar_never_exceeds_the_width_of_the_terminal(
    columns: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch, columns=columns)
    with Bar() as bar:
        bar.start(400_000_000_000, "Downloading, converting")
        bar.compiling()
        for _ in range(3):
            clock.now += 1
            bar.advance(1_234_567_890)
    assert drawn(terminal)
    assert all(len(line) < columns for line in drawn(terminal))
    assert ("of 400 GB" in drawn(terminal)[-2]) == (columns == 80)


def test_compilation_is_shown_in_the_line_until_there_is_progress(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch)
    with Bar() as bar:
        bar.start(1000, "Converting")
        bar.compiling()
        clock.now += 1
        bar.advance(500)
    assert drawn(terminal)[1:] == [
        "Converting: compiling kernels, once on this machine ...",
        "Converting   50%  500 B of 1 kB",
        "",
    ]


def test_compilation_is_not_shown_once_other_output_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with Bar() as bar:
        bar.note("Generating")
        bar.clear()
        before = terminal.getvalue()
        bar.compiling()
    assert terminal.getvalue() == before


def test_a_bar_shows_that_numba_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with Bar() as bar:
        bar.note("Generating")
        with bar.while_compiling():
            assert numba.njit("int64(int64)")(lambda number: number + 1)(1) == 2
    assert drawn(terminal)[1] == "Generating: compiling kernels, once on this machine ..."


def test_a_bar_is_silent_if_stderr_is_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        bar.note("Loading")
        bar.compiling()
        bar.advance(1)  # before it is known how much there is
        bar.start(100, "Reading")
        bar.advance(50)
        bar.start_steps(3, "Calibrating", "layer")
        bar.reach(1)
    assert capsys.readouterr().err == ""


def test_a_note_before_the_first_step_is_erased_and_a_step_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with StepLines() as lines:
        lines.note("Loading")
        lines.say("8 examples")
    assert drawn(terminal) == ["Loading ...", "", "8 examples\n", "Loading ...", ""]
    with StepLines() as lines:
        lines.step(1, 3, lambda: "loss 1")
    assert terminal.getvalue().endswith("step 1/3  loss 1\n")
