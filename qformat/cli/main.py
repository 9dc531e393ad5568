"""The command `qformat`: a table of its subcommands, each imported only when it is called, so that help is instant."""

from __future__ import annotations

import errno
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from qformat.cli.display import echo, echo_json, echo_layout
from qformat.cli.library_messages import filter_messages_of_libraries
from qformat.cli.messages import as_flag, failure_record
from qformat.cli.waiting import choose_how_to_wait
from qformat.errors import Interrupted, QformatError, UsageError, spelled
from qformat.processes import check_single_process
from qformat.version import __version__

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

GROUPS = {
    "Make": {
        "convert": "Convert a checkpoint into a 4-bit artifact.",
        "tune": "Tune an artifact's scales and norms to its 16-bit source.",
        "export": "Write an artifact as a plain 16- or 32-bit checkpoint.",
    },
    "Check": {
        "verify": "Check an artifact's integrity and its error against the source.",
        "eval": "Compare an artifact's predictions with its 16-bit source.",
        "inspect": "Show the tensors of an artifact or a checkpoint.",
        "diff": "Show how two artifacts differ.",
        "seal": "Accept deliberate changes of an artifact's small files.",
    },
    "Run": {
        "generate": "Generate text with an artifact.",
        "info": "Show devices, backends, versions and readable formats.",
    },
    "Train": {
        "train": "Train a LoRA adapter on an artifact.",
    },
    "Share": {
        "publish": "Publish an artifact on the Hub, with a model card.",
        "fetch": "Download an artifact from the Hub and check every byte.",
    },
}
"""Commands under the headings of the help, with their one-line summaries."""

COMMANDS = {name: summary for commands in GROUPS.values() for name, summary in commands.items()}

RESUMED = ("convert", "tune", "export", "publish", "fetch")
"""Commands that continue an interrupted run when they are called again."""

WRITING = (*RESUMED, "eval", "seal", "train")
"""Commands that write files, so that several processes of a launcher such as torchrun would disturb each other."""


def module_of(command: str) -> str:
    """Return the name of the module of a command. Its package is the heading of the help in lower case."""
    (heading,) = (heading for heading, commands in GROUPS.items() if command in commands)
    return f"qformat.cli.commands.{heading.lower()}.{command}"


_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE}
"""Errors of writing to an open file. Those that name a file are not about the output of a command."""


class _LazyGroup(click.Group):
    """A group whose commands live in `qformat.cli.commands.HEADING.NAME` under the name `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(module_of(cmd_name)).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, because importing them all takes seconds."""
        width = max(map(len, COMMANDS))
        for heading, commands in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in commands.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qformat")
def cli() -> None:
    """Turn 16-bit model checkpoints into small, verifiable 4-bit (NF4) artifacts.

    \b
    Example:
      qformat convert SmolLM2-135M-Instruct SmolLM2-135M-Instruct-nf4
      qformat verify SmolLM2-135M-Instruct-nf4 --source SmolLM2-135M-Instruct

    `qformat COMMAND --help` describes a command and its options.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    The exit code is 0 for success, 1 for a failed check or an invalid file, 2 for wrong usage and 130 after an
    interruption.
    """
    choose_how_to_wait()
    # PEFT imports bitsandbytes if it is installed. No command uses it, and where the package `kernels` is installed,
    # too, its import fetches native code from the Hub.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    filter_messages_of_libraries()
    code = run(arguments)
    try:
        sys.stdout.flush()
    except OSError as problem:
        code = _stop_output(problem)
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Errors of qformat are printed without a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Imports and plans make many objects that live to the end. Searching them for cycles at the default rate costs
    # 0.3 s of a conversion.
    gc.set_threshold(50_000, 20, 20)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(given)
    except OSError as problem:
        if problem.errno not in _CANNOT_WRITE or problem.filename is not None:
            raise
        return _stop_output(problem)


def _run(given: Sequence[str]) -> int:
    try:
        for command in {*given[:1]} & {*WRITING}:
            check_single_process(f"qformat {command}", os.environ)
        result = cli.main(args=list(given), prog_name="qformat", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as shown:
        echo_layout(shown.format_message(), err=True)
        return EXIT_USAGE
    except (click.ClickException, click.Abort, KeyboardInterrupt, QformatError) as problem:
        return _report(problem, given)
    except OSError as problem:
        if problem.filename is None:
            raise
        # A file that the library has no message of its own for, such as one of a cache.
        return _report(UsageError(f"{problem.filename}: {problem.strerror}. Check the path and its permissions"), given)


def _report(problem: BaseException, given: Sequence[str]) -> int:
    if "--json" in given:
        echo_json(failure_record(problem))
    return _show_problem(problem, given)


def _show_problem(problem: BaseException, given: Sequence[str]) -> int:
    """Print a problem for people and return the exit code."""
    if isinstance(problem, click.ClickException):
        _show_usage(problem)
        return EXIT_USAGE
    if isinstance(problem, (KeyboardInterrupt, click.Abort, Interrupted)):
        continues = "Run the same command again to continue." if {*given[:1]} & {*RESUMED} else ""
        # click has ended the line of the terminal's ^C, except for errors of qformat.
        start = ("",) if isinstance(problem, Interrupted) else ()
        echo(*start, f"Interrupted. {str(problem) or continues}".rstrip(), err=True)
        return EXIT_INTERRUPTED
    assert isinstance(problem, QformatError)
    echo(*f"Error: {spelled(problem.words, as_flag)}".split("\n"), err=True)
    return EXIT_USAGE if isinstance(problem, UsageError) else EXIT_FAILED


def _show_usage(problem: click.ClickException) -> None:
    """Print wrong usage as click does."""
    context = problem.ctx if isinstance(problem, click.UsageError) else None
    if context is not None:
        hint = f"Try '{context.command_path} {max(context.help_option_names, key=len)}' for help."
        echo_layout(f"{context.get_usage()}\n{hint}\n", err=True)
    echo_layout(f"Error: {problem.format_message()}", err=True)


def _stop_output(problem: OSError) -> int:
    """Say that the output cannot be written, and discard the rest of it, which Python would try to write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if problem.errno != errno.EPIPE:  # the reader of a pipe has seen enough
        echo(f"Error: the output cannot be written: {problem.strerror}. Write it to another place", err=True)
    return EXIT_FAILED


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
