"""What commands share: options as one record, and the checks of where a page goes."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qformat.cli.main import COMMANDS, cli
from qformat.cli.options import options_record, refuse_report_in
from qformat.errors import UsageError


@dataclass(frozen=True, slots=True)
class Shown:
    name: str
    times: int


def test_a_command_gets_its_options_as_one_record() -> None:
    got = []

    @click.command()
    @click.argument("name")
    @click.option("--times", type=int, default=3)
    @options_record(Shown)
    def command(options: Shown) -> None:
        """Show a name."""
        got.append(options)

    assert CliRunner().invoke(command, ["it", "--times", "4"], catch_exceptions=False).exit_code == 0
    assert got == [Shown("it", 4)]
    assert command.help == "Show a name."


@pytest.mark.parametrize("name", COMMANDS)
def test_the_record_of_a_command_has_just_its_options(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    module = __import__(f"qformat.cli.commands.{name}", fromlist=["command"])
    records = [
        member
        for member in vars(module).values()
        if isinstance(member, type) and is_dataclass(member) and member.__module__ == module.__name__
    ]
    assert records or len(command.params) <= 3
    for record in records:
        expected = {item.name for item in fields(record)}
        found = {parameter.name for parameter in command.params}
        if "settings" in expected:  # one field for all of them
            expected -= {"settings"}
            found &= expected
        assert found == expected


def test_one_option_has_one_name_and_one_meaning() -> None:
    """An option that several commands have is of one type; two names for one thing do not come back."""
    gone = {"output", "shard_size", "window_length", "threads"}
    kinds: dict[str, set[str]] = {}
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for parameter in command.params:
            assert parameter.name is not None
            kinds.setdefault(parameter.name, set()).add(type(parameter.type).__name__)
    assert not gone & kinds.keys()
    shared = {"workers", "max_shard_size", "force", "restart", "dry_run", "as_json", "device", "report", "revision"}
    assert {name: kinds[name] for name in shared if len(kinds[name]) > 1} == {}


def test_a_page_is_refused_where_it_cannot_be_or_would_spoil_what_is_checked(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    refuse_report_in(tmp_path / "page.html", model)
    for report, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere" / "page.html", "there is no folder"),
        (model / "page.html", "must stay as it is"),
    ):
        with pytest.raises(UsageError, match=says):
            refuse_report_in(report, model)
