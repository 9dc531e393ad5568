"""`qformat generate` writes each piece of text as soon as it has it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from qformat.cli.main import run
from qformat.model.text.generation import Generation
from tests.training import runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_artifact(tmp_path_factory.mktemp("streaming"))


def test_pieces_leave_the_process_before_the_next_one_is_generated(
    artifact: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = []

    def generate(*_: object, on_text: Any, **__: object) -> Generation:
        for piece in ("The", " first", " piece"):
            on_text(piece)
            arrived.append(capfd.readouterr().out)
        return Generation("The first piece", 1, 3, 0.1, 10.0, 1000)

    monkeypatch.setattr("qformat.model.text.generation.generate", generate)
    assert run(["generate", str(artifact), "--prompt", "text", "--device", "cpu"]) == 0
    assert arrived == ["The", " first", " piece"]
    shown = capfd.readouterr()
    assert shown.out == "\n"
    assert "10.0 tokens/s" in shown.err


def test_the_lines_of_progress_are_gone_before_the_text_begins(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def generate(*_: object, on_text: Any, **__: object) -> Generation:
        on_text("Text")
        terminal.write("text")
        return Generation("Text", 1, 1, 0.1, 0.0, 1000)

    monkeypatch.setattr("qformat.model.text.generation.generate", generate)
    assert run(["generate", str(artifact), "--prompt", "text", "--device", "cpu"]) == 0
    shown = [part.strip() for part in terminal.getvalue().split("\r")[1:]]
    assert shown[0] == "Loading ..."
    assert shown[-3:-1] == ["Generating ...", ""]
    assert shown[-1].startswith("text")
