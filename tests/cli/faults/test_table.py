"""The table of faults is complete: every command, every fault of those that write, and every path that is written."""

from __future__ import annotations

import ast

import click
import pytest

from qformat.cli.main import WRITING, cli
from tests.cli.faults.table import FORMS, ON_THE_HUB, READ_PATHS, READING, Fault
from tests.cli.faults.test_faults_at_a_call import AT_A_CALL
from tests.repository import ROOT

COMMANDS = cli.list_commands(click.Context(cli))
WRITTEN = {form.command for form in FORMS.values()}


def test_every_command_is_in_the_table() -> None:
    reading = {arguments.split()[0] for arguments in READING.values()}
    assert {*COMMANDS} == WRITTEN | {*ON_THE_HUB} | reading
    assert {*WRITING} <= WRITTEN | {*ON_THE_HUB}
    assert {*COMMANDS} - WRITTEN - {*ON_THE_HUB} <= reading


def test_every_fault_has_a_driver_for_the_commands_that_write_files() -> None:
    assert {*Fault} == {*AT_A_CALL, Fault.SECOND_WRITER, Fault.READ_ONLY}


@pytest.mark.parametrize("command", ON_THE_HUB)
def test_every_fault_has_a_test_for_the_commands_that_write_on_the_hub(command: str) -> None:
    assert ON_THE_HUB[command].keys() == {*Fault}
    for named in ON_THE_HUB[command].values():
        path, _, function = named.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, named


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_that_a_command_takes_is_known_as_read_or_written(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = [parameter for parameter in command.params if isinstance(parameter.type, click.Path)]
    forms = [form.arguments.split() for form in FORMS.values() if form.command == name]
    for option in options:
        if option.name not in READ_PATHS:
            assert any(option.name == "out" or {*option.opts} & {*form} for form in forms), (name, option.name)
