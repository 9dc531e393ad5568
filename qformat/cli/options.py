"""Options that several commands have, and how a command gets its options: as one record."""

from __future__ import annotations

import functools
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
    """Give a command the options of these names as one value, `settings`. make: is called with them by name."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(**options: Any) -> None:
            settings = make(**{name: options.pop(name) for name in names})
            function(settings=settings, **options)

        return call

    return decorate


def artifact_argument(function: Function) -> Function:
    """ART, the folder of an artifact."""
    return click.argument("artifact", metavar="ART", type=click.Path(path_type=Path))(function)


def out_argument(*, required: bool = True) -> Decorator:
    """OUT, what the command makes."""
    metavar = "OUT" if required else "[OUT]"
    return click.argument("out", metavar=metavar, type=click.Path(path_type=Path), required=required)


def json_option(help: str = "Print one JSON object.") -> Decorator:
    """Return the option for machines."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def workers_option(help: str = "Threads.  [default: one a core]") -> Decorator:
    """Return the option for the number of threads."""
    return click.option("--workers", type=click.IntRange(min=1), help=help)


def output_options(made: str) -> Decorator:
    """Return the options for what stands under OUT, or was begun for it. made: what the command makes."""

    def decorate(function: Function) -> Function:
        restart = click.option(
            "--restart", is_flag=True, help="Drop what an interrupted run left instead of continuing it."
        )
        force = click.option(
            "--force", is_flag=True, help=f"Replace the {made} OUT, in one step once the new one is whole."
        )
        return force(restart(function))

    return decorate


def written_shards_options(made: str) -> Decorator:
    """Return the options of a command that writes shards. made: what the command makes."""

    def decorate(function: Function) -> Function:
        shards = click.option("--max-shard-size", default="5GB", show_default=True, help="Largest size of a shard.")
        workers = workers_option("Threads; any number gives the same bytes.  [default: one a core]")
        return workers(shards(output_options(made)(dry_run_option()(json_option()(function)))))

    return decorate


def dry_run_option(help: str = "Show what would be written; write nothing.") -> Decorator:
    """Return the option for a plan only."""
    return click.option("--dry-run", is_flag=True, help=help)


def device_option(function: Function) -> Function:
    """Add the option for where a model runs."""
    text = "cpu, cuda, cuda:1, ...; by default the GPU if there is one."
    return click.option("--device", metavar="DEVICE", help=text)(function)


def backend_option(function: Function) -> Function:
    """Add the option that forces a backend."""
    text = "Force a backend, as QFORMAT_BACKEND does: numba, triton, torch."
    return click.option("--backend", metavar="NAME", help=text)(function)


def trust_remote_code_option(comes_with: str = "the artifact") -> Decorator:
    """Return the option for code that comes with a model."""
    return click.option("--trust-remote-code", is_flag=True, help=f"Run model code that comes with {comes_with}.")


def report_option(function: Function) -> Function:
    """Add the option for a page; see `refuse_report_in`."""
    path = click.Path(path_type=Path)
    return click.option("--report", metavar="FILE.html", type=path, help="Write a page that opens offline.")(function)


def refuse_report_in(report: Path, *models: Path | str) -> None:
    """Refuse a page that could not be written after minutes of work, or would lie inside one of the models."""
    folder = report.absolute().parent
    if report.is_dir():
        raise UsageError(f"--report {report}: is a folder, expected the name of a file")
    if not folder.is_dir():
        raise UsageError(f"--report {report}: there is no folder {folder}")
    for model in models:
        if folder.resolve().is_relative_to(Path(model).resolve()):
            raise UsageError(f"--report {report}: lies inside {model}, which must stay as it is. Choose another folder")
