"""Run the examples of a page in order and compare what they print with what the page shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.docs.examples.outputs import difference, has_elision
from tools.docs.examples.page import PROMPT, Command, Console, Example, File, Script, Setup
from tools.docs.examples.rules import Finding, is_run
from tools.docs.examples.sandbox import GUARD_S, Ran, Sandbox

NOT_IN_AN_OUTPUT = (PROMPT, "```")
N_LINES_SHOWN = 30
"""Last lines of the output to show of a command that failed."""


@dataclass(frozen=True, slots=True)
class Correction:
    """An output that the page must show instead of its present one.

    Attributes:
        line: First line of the present output, from 1.
        n_lines: Number of lines of the present output.
        output: Lines of the new output.
    """

    line: int
    n_lines: int
    output: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """An example that does not do what the page shows.

    Attributes:
        finding: What is wrong, for a reader.
        correction: How the page can be mended; None if a person has to look at it.
    """

    finding: Finding
    correction: Correction | None = None


def run(examples: Sequence[Example], sandbox: Sandbox) -> Iterator[Problem]:
    """Run examples in order; yield what does not agree with the page.

    Args:
        examples: Examples of a page, which the static rules have passed.
        sandbox: Where they run. Commands see the files of those before.
    """
    for example in examples:
        match example:
            case Setup():
                for command in example.commands:
                    ran = sandbox.shell(command.text)
                    yield from _exit_problems(command, ran, 0)
            case Console() if example.checking.not_run is None:
                yield from _run_console(example, sandbox)
            case Script() if example.checking.not_run is None:
                yield from _run_script(example, sandbox)
            case File():
                sandbox.write(example.name, example.text)


def _run_console(block: Console, sandbox: Sandbox) -> Iterator[Problem]:
    for command in block.commands:
        if not is_run(command):
            continue
        ran = sandbox.shell(command.text)
        is_last = command is block.commands[-1]
        failures = list(_exit_problems(command, ran, block.checking.exit_code if is_last else 0))
        yield from failures or _output_problems(command, ran, figures=block.checking.figures_vary)


def _run_script(script: Script, sandbox: Sandbox) -> Iterator[Problem]:
    ran = sandbox.python(script.text)
    shown = Command(script.line, "the script", script.output or (), script.output_line)
    failures = list(_exit_problems(shown, ran, script.checking.exit_code))
    yield from failures
    if not failures and script.output is not None:
        yield from _output_problems(shown, ran, figures=script.checking.figures_vary)


def _exit_problems(command: Command, ran: Ran, exit_code: int) -> Iterator[Problem]:
    if ran.exit_code != exit_code:
        ended = (
            f"ended after {GUARD_S} s" if ran.exit_code is None else f"exit code {ran.exit_code}, expected {exit_code}"
        )
        printed = "\n".join(ran.output[-N_LINES_SHOWN:])
        yield Problem(Finding(command.line, f"{command.text}\n{ended}; it printed:\n{printed}"))


def _output_problems(command: Command, ran: Ran, *, figures: bool) -> Iterator[Problem]:
    shows_versions = command.text.startswith("qformat info")
    diff = difference(command.output, ran.output, versions=shows_versions, figures=figures)
    if diff is None:
        return
    # Which of the new lines the author would leave out, only the author knows; others would end the block or look like
    # a command.
    correction = None
    if not has_elision(command.output) and not any(line.startswith(NOT_IN_AN_OUTPUT) for line in ran.output):
        correction = Correction(command.output_line, len(command.output), ran.output)
    yield Problem(Finding(command.line, f"{command.text}\n{diff}"), correction)
