"""Tables, times, names and sentences as commands print them.

All that commands print goes through the functions `echo` of this module. They show control characters as escapes, so
that no file and no server can write to the terminal what it wants.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import click

from qformat import strict_json
from qformat.printable import as_json, printable, shown

MAX_CHARACTERS_OF_A_LINE = 10_000
"""Length of the longest line that is printed whole. `--json` prints everything."""

N_NAMED = 5
"""Largest number of names that a line lists before it only counts the others."""


def terminal_width(stream: TextIO) -> int:
    """Return the number of columns of the terminal that a stream writes to, 80 if it is not known."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # not a terminal, or a stream without a file
        columns = 0
    return columns or shutil.get_terminal_size().columns


def echo(*lines: str, err: bool = False) -> None:
    """Print sentences, wrapped between words on a terminal. Paths and other long words stay in one piece.

    Args:
        lines: Lines to print, none for an empty one. Each one is wrapped by itself. A line end inside a line belongs to
            a name or value and is shown as an escape.
        err: Print to stderr instead of stdout.
    """
    stream = sys.stderr if err else sys.stdout
    printed = [shown(line, max_characters=MAX_CHARACTERS_OF_A_LINE) for line in lines or ("",)]
    if stream.isatty():
        printed = [part for line in printed for part in _wrapped(line, terminal_width(stream))]
    click.echo("\n".join(printed), err=err)


def echo_layout(text: str, *, err: bool = False) -> None:
    """Print a text whose lines are laid out already, such as a table or a page.

    Args:
        text: Lines to print.
        err: Print to stderr instead of stdout.
    """
    click.echo(printable(text), err=err)


def echo_piece(text: str) -> None:
    """Print a piece of generated text to stdout as it is, except that a terminal gets escapes of control characters."""
    click.echo(printable(text) if sys.stdout.isatty() else text, nl=False, color=True)  # otherwise click removes some


def _wrapped(line: str, width: int) -> list[str]:
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(line) or [""]


def format_table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), width: int | None = None) -> str:
    """Return rows as aligned columns, with escapes in the place of control characters, and long cells shortened.

    Args:
        rows: Cells of each row; the first row is the header.
        right: Indices of the columns to align to the right.
        width: Width at which the texts of the last column are wrapped. Not wrapped if omitted.
    """
    rows = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    lines = []
    for row in rows:
        last = [row[-1]] if width is None else _wrapped(row[-1], max(width - indent, 20))
        cells = [
            cell.rjust(size) if column in right else cell.ljust(size)
            for column, (cell, size) in enumerate(zip((*row[:-1], last[0]), widths, strict=True))
        ]
        lines += ["  ".join(cells).rstrip(), *(" " * indent + more for more in last[1:])]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a time as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def some(names: Sequence[str], *, of: str = "") -> str:
    """Return the first of some names, and how many more there are.

    Args:
        names: All names.
        of: Kind of the names, with a space in front, such as " tensors".
    """
    hidden = len(names) - N_NAMED
    return ", ".join(names[:N_NAMED]) + (f" and {hidden}{of} more" if hidden > 0 else "")


def echo_json(record: object, *, indent: int | None = 2) -> None:
    """Print one JSON object.

    Args:
        record: The object.
        indent: Number of spaces per level; None for compact text on one line.
    """
    click.echo(as_json(strict_json.dumps(record, indent=indent)))


def echo_complete(out: Path) -> None:
    """Print that an earlier run had completed this output."""
    echo(f"{out}: an earlier run had completed it; removed what that run left beside it")


def echo_findings(findings: Iterable[tuple[str, str]]) -> None:
    """Print findings, of each reason the first ones and how many more there are.

    Args:
        findings: Reason code and message of every finding.
    """
    messages: dict[str, list[str]] = {}
    for reason, message in findings:
        messages.setdefault(reason, []).append(message)
    for reason, found in messages.items():
        for message in found[:N_NAMED]:
            echo(f"{reason}: {message}")
        if len(found) > N_NAMED:
            echo(f"... and {len(found) - N_NAMED} more (--json lists all)")


def verdict(n_findings: int) -> str:
    """Return the last line of a check."""
    return f"FAILED: {n_findings} finding{'s' if n_findings != 1 else ''}" if n_findings else "passed"
