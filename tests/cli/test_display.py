"""Tables and sentences as they are printed."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings

import pytest

from qformat.cli.display import echo, echo_json, echo_layout, echo_piece, format_table, some
from qformat.cli.library_messages import filter_messages_of_libraries

PATH = "/a/very/long/path/that-has-hyphens/and-more-of-them/model-00001-of-00002.safetensors"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_sentence_is_wrapped_between_words_on_a_terminal(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, stream, terminal)
    monkeypatch.setenv("COLUMNS", "40")
    echo(f"Error: {PATH}: the header ends too early.", "", "Download the file again", err=stream == "stderr")
    assert terminal.getvalue() == f"Error:\n{PATH}:\nthe header ends too early.\n\nDownload the file again\n"


def test_a_sentence_stays_one_line_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    echo(f"Error: {PATH}: the header ends too early", err=True)
    assert capsys.readouterr().err == f"Error: {PATH}: the header ends too early\n"


def test_the_last_column_of_a_table_is_wrapped_at_a_width() -> None:
    rows = [("name", "n", "meaning"), ("a", "10", "first second third fourth"), ("bb", "2", "")]
    assert format_table(rows, right=(1,), width=30) == (
        "name   n  meaning\na     10  first second third\n          fourth\nbb     2"
    )
    assert format_table(rows, right=(1,)).splitlines()[1] == "a     10  first second third fourth"


def test_a_list_of_names_is_cut() -> None:
    names = [str(number) for number in range(7)]
    assert some(names[:5], of=" tensors") == "0, 1, 2, 3, 4"
    assert some(names, of=" tensors") == "0, 1, 2, 3, 4 and 2 tensors more"


HOSTILE = "\x1b[2J\x9b1m\x07\u202eevil\u2066\u2028\udcff\x7f\r"
SHOWN = r"\x1b[2J\x9b1m\x07\u202eevil\u2066\u2028\udcff\x7f\r"


def test_control_characters_are_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"name {HOSTILE}\nfake line\tend")
    echo_layout(f"{HOSTILE}\n\tnext line")
    echo_layout(format_table([("name", "n"), (f"{HOSTILE}\nfake", "1")]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == rf"name {SHOWN}\nfake line\tend"
    assert lines[1:3] == [SHOWN, "\tnext line"]
    assert lines[4] == rf"{SHOWN}\nfake  1"


def test_json_has_escapes_that_json_readers_know(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"name": HOSTILE})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"name": HOSTILE}
    assert printed.isascii()
    assert "\x1b" not in printed


def test_generated_text_is_filtered_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    echo_piece("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\x1b[2J\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    echo_piece("a\x1b[2J\n")
    assert terminal.getvalue() == "a\\x1b[2J\n"


def test_warnings_and_log_records_of_libraries_are_filtered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    factory = logging.getLogRecordFactory()
    try:
        filter_messages_of_libraries()
        handler = logging.StreamHandler()
        handler.handle(logging.getLogger("library").makeRecord("library", 30, "", 1, "of %s", (HOSTILE,), None))
        warnings.showwarning("of " + HOSTILE, UserWarning, "file.py", 1)
    finally:
        logging.setLogRecordFactory(factory)
    printed = capsys.readouterr().err
    assert printed.count(f"of {SHOWN}") == 2
    assert "\x1b" not in printed


def test_a_long_value_is_printed_without_its_middle(capsys: pytest.CaptureFixture[str]) -> None:
    echo("x" * 10**6)
    echo_layout(format_table([("name", "n"), ("x" * 10**6, "1")]))
    printed = capsys.readouterr().out
    assert printed.count("(1,000,000 characters)") == 2
    assert len(printed) < 20_000
