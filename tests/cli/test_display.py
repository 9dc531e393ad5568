"""Tables and sentences as they are printed."""

from __future__ import annotations

import io
import sys

import pytest

from qformat.cli.display import echo, format_table, some

PATH = "/a/very/long/path/that-has-hyphens/and-more-of-them/model-00001-of-00002.safetensors"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_sentence_is_wrapped_between_words_on_a_terminal(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, stream, terminal)
    monkeypatch.setenv("COLUMNS", "40")
    echo(f"Error: {PATH}: the header ends too early.\n\nDownload the file again", err=stream == "stderr")
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
