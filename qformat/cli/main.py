"""`qformat`: the table of commands. A command's module is imported when it is called, so that `--help` is instant."""

from __future__ import annotations

import gc
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from qformat.cli.flags import as_flag
from qformat.cli.waiting import choose_how_to_wait
from qformat.errors import Interrupted, QformatError, UsageError, spelled
from qformat.version import __version__

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

COMMANDS = {
    "convert": "Convert a 16-bit checkpoint into a 4-bit artifact.",
    "export": "Write an artifact as a plain 16- or 32-bit checkpoint.",
    "inspect": "Show what an artifact or a checkpoint holds.",
    "verify": "Prove that an artifact is whole, and how far it is from its source.",
    "publish": "Publish an artifact on the Hub, with a model card.",
    "fetch": "Download an artifact from the Hub, every byte checked.",
    "diff": "Tell what differs between two artifacts.",
    "eval": "Measure on texts how close an artifact is to its 16-bit model.",
    "generate": "Generate text with an artifact.",
    "tune": "Bring an artifact closer to its 16-bit source, with the same codes and size.",
    "train": "Train a LoRA adapter on an artifact.",
    "info": "Show devices, backends and versions.",
}


class _LazyGroup(click.Group):
    """A group whose commands live in `qformat.cli.commands.NAME` under the name `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"qformat.cli.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table: importing them all would take longer than the answer is worth."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qformat")
def cli() -> None:
    """Turn 16-bit model checkpoints into small, verifiable 4-bit (NF4) artifacts.

    \b
    Example:
      qformat convert SmolLM2-135M-Instruct SmolLM2-135M-Instruct-nf4
      qformat verify SmolLM2-135M-Instruct-nf4 --source SmolLM2-135M-Instruct
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 good, 1 a failed check or a bad file, 2 wrong usage, 130 interrupted."""
    choose_how_to_wait()
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Errors of qformat are printed without a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Importing and planning make many objects that live to the end: looking for cycles among them every few hundred
    # costs 0.3 s of a conversion.
    gc.set_threshold(50_000, 20, 20)
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments), prog_name="qformat", standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as shown:
        click.echo(shown.format_message(), err=True)
        return EXIT_USAGE
    except click.ClickException as wrong:
        wrong.show()
        return EXIT_USAGE
    except UsageError as wrong:
        click.echo(f"Error: {spelled(wrong.words, as_flag)}", err=True)
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort, Interrupted) as stopped:
        what_to_do = str(stopped) or "Nothing is lost: the same command continues."
        click.echo(f"\nInterrupted. {what_to_do}", err=True)
        return EXIT_INTERRUPTED
    except QformatError as failed:
        click.echo(f"Error: {spelled(failed.words, as_flag)}", err=True)
        return EXIT_FAILED


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
