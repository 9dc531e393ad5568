"""How the command line spells the options of the library."""

from __future__ import annotations

import ast
import re

import pytest

from qformat.cli.messages import as_flag
from qformat.errors import Option
from tests.repository import ROOT

COMMAND = re.compile(r"(?:qformat|llama-gguf-split) [^`,;()]*")
"""A complete command in a message, which may contain flags. It ends at the next punctuation mark of the sentence."""

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")

OTHER_LANGUAGES = ("qformat/cli", "qformat/report", "qformat/hub/card/page.py")
"""Places where flags are fine: commands, style sheets, and the shell commands of a model card."""


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        (Option("keep_nonfinite", True), "--keep-nonfinite"),
        (Option("rank"), "--rank"),
        (Option("double_quant", False), "--no-double-quant"),
        (Option("resume", "checkpoint-4"), "--resume=checkpoint-4"),
        (Option("skip", ("*.o_proj", "lm_head")), "--skip='*.o_proj' --skip=lm_head"),
    ],
)
def test_an_option_is_spelled_as_a_flag(option: Option, flag: str) -> None:
    assert as_flag(option) == flag


def mentions_flag(text: str) -> bool:
    """Return whether a text has a flag outside a complete command."""
    return FLAG.search(COMMAND.sub("", text)) is not None


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("Use --force", True),
        ("Check it with qformat verify, or use another dtype (--dtype float32)", True),
        ("Create it with: qformat verify ART --source SRC --json > FILE", False),
        ("run `qformat train --dry-run`. Then lower the batch", False),
        ("run `qformat info`, or give --json", True),
    ],
)
def test_a_flag_is_found_outside_a_command(text: str, mentions: bool) -> None:
    assert mentions_flag(text) is mentions


def test_the_library_mentions_no_flags() -> None:
    """Only commands mention flags; docstrings may describe what a command does."""
    found = []
    for folder in (ROOT / "qformat", ROOT / "converters"):
        for path in sorted(folder.rglob("*.py")):
            if path.relative_to(ROOT).as_posix().startswith(OTHER_LANGUAGES):
                continue
            tree = ast.parse(path.read_text())
            prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
                if mentions_flag(node.value)
            ]
    assert found == []
