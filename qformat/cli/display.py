"""How commands show tables, times and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from qformat import strict_json

N_NAMED = 5
"""A line names so many of a list, and tells how many more there are."""


def format_table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Return rows as aligned columns; the columns in `right` are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a time as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_bar(total: int, description: str, *, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """Show bytes, rate and time left on stderr, nothing if that is no terminal; yields `update(nbytes)`."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", leave=False) as bar:

        def update(nbytes: int) -> None:
            bar.update(nbytes)

        yield update


@contextmanager
def step_bar(total: int, description: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Show steps and time left on stderr, nothing if that is no terminal; yields `show(steps done)`.

    The time left follows from the steps since the first call: those that an earlier run did took no time.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from tqdm import tqdm

    started: list[int] = []
    with tqdm(total=total, desc=description, unit=f" {unit}", leave=False) as bar:

        def show(done: int) -> None:
            if first := not started:
                started.append(done)
                bar.n = bar.initial = done
            bar.update(0 if first else done - bar.n)
            bar.refresh()

        yield show


def some(names: Sequence[str], *, of: str = "") -> str:
    """Return the first of some names, and how many more there are. of: what they are, such as " tensors"."""
    hidden = len(names) - N_NAMED
    return ", ".join(names[:N_NAMED]) + (f" and {hidden}{of} more" if hidden > 0 else "")


def echo_json(record: object) -> None:
    """Print one JSON object."""
    click.echo(strict_json.dumps(record, indent=2))


def say_compiling() -> None:
    """Tell on stderr why the first run on a machine takes longer."""
    click.echo("Compiling kernels, once on this machine ...", err=True)


def say_complete(out: Path) -> None:
    """Tell that an earlier run had made this very output."""
    click.echo(f"{out}: was complete already; cleaned up after the earlier run")


def verdict(n_findings: int) -> str:
    """Return the last line of a check."""
    return f"FAILED: {n_findings} finding{'s' if n_findings != 1 else ''}" if n_findings else "passed"
