"""Options that several commands have, and the record in which a command gets its options."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from qformat.errors import UsageError

Record = TypeVar("Record")
Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


def options_record(record: type[Record]) -> Callable[[Callable[[Record], None]], Function]:
    """Give a command its options as one record, whose fields have the names of the options."""

    def decorate(function: Callable[[Record], None]) -> Function:
        @functools.wraps(function)
        def call(**options: Any) -> None:
            function(record(**options))

        return call

    return decorate


def settings_of(names: Collection[str], make: Callable[..., object]) -> Decorator:
    """Give a command several of its options as one value, `settings`.

    Args:
        names: Names of the options to collect.
        make: Makes the value from these options, given by name.

    Returns:
        A decorator for the function of a command.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(**options: Any) -> None:
            settings = make(**{name: options.pop(name) for name in names})
            function(settings=settings, **options)

        return call

    return decorate


def artifact_argument(function: Function) -> Function:
    """Add the argument ART, the folder of an artifact."""
    return click.argument("artifact", metavar="ART", type=click.Path(path_type=Path))(function)


def out_argument(*, required: bool = True) -> Decorator:
    """Return the argument OUT, the output of the command."""
    metavar = "OUT" if required else "[OUT]"
    return click.argument("out", metavar=metavar, type=click.Path(path_type=Path), required=required)


def json_option(help: str = "Print the result as one JSON object.") -> Decorator:
    """Return the option for output that programs read."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def workers_option(help: str = "Number of threads.  [default: one per core]") -> Decorator:
    """Return the option for the number of threads."""
    return click.option("--workers", metavar="N", type=click.IntRange(min=1), help=help)


def output_options(made: str) -> Decorator:
    """Return the options for an OUT that exists already, or that an interrupted run has begun.

    Args:
        made: Kind of output, such as "artifact".

    Returns:
        A decorator for the function of a command.
    """

    def decorate(function: Function) -> Function:
        restart = click.option("--restart", is_flag=True, help="Start again instead of resuming an interrupted run.")
        force = click.option(
            "--force", is_flag=True, help=f"Replace the {made} OUT, atomically, once the new one is complete."
        )
        return force(restart(function))

    return decorate


def written_shards_options(made: str) -> Decorator:
    """Return the options of a command that writes shards.

    Args:
        made: Kind of output, such as "artifact".

    Returns:
        A decorator for the function of a command.
    """

    def decorate(function: Function) -> Function:
        shards = click.option(
            "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest size of a shard."
        )
        workers = workers_option("Number of threads. It does not change the output.  [default: one per core]")
        return workers(shards(output_options(made)(dry_run_option()(json_option()(function)))))

    return decorate


def dry_run_option(help: str = "Show what would be written, and write nothing.") -> Decorator:
    """Return the option that only shows a plan."""
    return click.option("--dry-run", is_flag=True, help=help)


def revision_option(help: str) -> Decorator:
    """Return the option for a revision of a repository on the Hub."""
    return click.option("--revision", metavar="REV", help=help)


def device_option(function: Function) -> Function:
    """Add the option for the device that runs a model."""
    text = "Device: cpu, cuda, cuda:1, ...  [default: the GPU if there is one]"
    return click.option("--device", metavar="DEVICE", help=text)(function)


def backend_option(function: Function) -> Function:
    """Add the option that forces a backend."""
    text = "Backend to use instead of the fastest: numba, triton or torch. Also set by QFORMAT_BACKEND."
    return click.option("--backend", metavar="NAME", help=text)(function)


def trust_remote_code_option(comes_with: str = "the artifact") -> Decorator:
    """Return the option that allows code that comes with a model to run."""
    return click.option("--trust-remote-code", is_flag=True, help=f"Run model code that comes with {comes_with}.")


def report_option(function: Function) -> Function:
    """Add the option for an HTML report; see `refuse_report_in`."""
    path = click.Path(path_type=Path)
    text = "Write a report as one HTML page that works offline."
    return click.option("--report", metavar="FILE.html", type=path, help=text)(function)


def refuse_report_in(report: Path, *models: Path | str) -> None:
    """Reject a path for a report that could not be written after minutes of work, or that lies inside a model.

    Args:
        report: Path that was given for the report.
        *models: Artifacts and checkpoints that must stay unmodified.

    Raises:
        UsageError: The path is a directory, its directory does not exist or is read-only, or it lies inside one of the
            models.
    """
    folder = report.absolute().parent
    if os.path.isdir(report):
        raise UsageError(f"--report {report}: is a directory. Give the name of a file")
    if not os.path.isdir(folder):
        raise UsageError(f"--report {report}: the directory {folder} does not exist")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise UsageError(
            f"--report {report}: cannot be written in {folder}: {problem.strerror}. Choose another directory"
        ) from None
    for model in models:
        if folder.resolve().is_relative_to(Path(model).resolve()):
            raise UsageError(
                f"--report {report}: lies inside {model}, which must stay unmodified. Choose another directory"
            )
