"""How far a command is: lines over steps, in place on a terminal and rarely elsewhere."""

from __future__ import annotations

import io
import sys

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr("qformat.cli.progress.time", moved)
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
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lines = StepLines()
    lines.step(1, 3, lambda: "loss 1")
    lines.say("evaluation")
    steps(lines, clock, n=3, seconds=0.1)
    assert terminal.getvalue().count("\r\x1b[Kstep ") == 4
    assert "loss 1\nevaluation\n" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_a_bar_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        bar.advance(1)  # before it is known how much there is
        bar.start(100, "Reading")
        bar.advance(50)
        bar.start_steps(3, "Calibrating", "layer")
        bar.advance(1)
    assert capsys.readouterr().err == ""
