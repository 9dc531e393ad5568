"""Options: records, headings and texts in the help, and the checks of where a page goes."""

from __future__ import annotations

import errno
import tempfile
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qformat.cli.help_sections import SectionedCommand
from qformat.cli.main import COMMANDS, cli, module_of, run
from qformat.cli.options import options_record, refuse_report_in
from qformat.errors import UsageError

MAX_OPTIONS_WITHOUT_HEADINGS = 10


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
def test_the_record_of_a_command_has_exactly_its_options(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    module = __import__(module_of(name), fromlist=["command"])
    records = [
        member
        for member in vars(module).values()
        if isinstance(member, type) and is_dataclass(member) and member.__module__ == module.__name__
    ]
    assert records
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_under_one_heading_of_the_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if not isinstance(command, SectionedCommand):
        assert len(options) <= MAX_OPTIONS_WITHOUT_HEADINGS
        return
    assert sorted(name for names in command.sections.values() for name in names) == sorted(
        str(option.name) for option in options
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    headings = [line.removesuffix(":") for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [*command.sections]
    for option in options:
        assert f"\n  {option.opts[0]} " in shown or f"\n  {option.opts[0]}\n" in shown, option.name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text_that_is_a_sentence(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for option in command.params:
        if isinstance(option, click.Option):
            text = (option.help or "").split("  [default")[0]
            assert text[:1].isupper() or text.startswith("16-bit"), option.name
            assert text.endswith((".", "...")), option.name


def test_a_read_only_directory_is_rejected_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(UsageError, match=r"--report .*page.html: cannot be written in .*: Read-only file system"):
        refuse_report_in(tmp_path / "page.html")


def test_a_path_of_a_page_is_rejected_if_it_cannot_be_written_or_lies_inside_a_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    refuse_report_in(tmp_path / "page.html", model)
    for report, says in (
        (tmp_path, "is a directory"),
        (tmp_path / "nowhere" / "page.html", "does not exist"),
        (model / "page.html", "must stay unmodified"),
    ):
        with pytest.raises(UsageError, match=says):
            refuse_report_in(report, model)
