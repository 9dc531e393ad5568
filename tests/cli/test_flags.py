"""How the command line spells the options of the library."""

from __future__ import annotations

import ast
import re

import pytest

from qformat.cli.flags import as_flag
from qformat.errors import Option
from tests.repository import ROOT

COMMANDS = ("qformat ", "llama-gguf-split ")
"""A string that holds one of these shows a complete command, and may contain flags."""

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


def test_the_library_mentions_no_flags() -> None:
    """Only commands mention flags; docstrings may describe what a command does."""
    flag = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
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
                if flag.search(node.value) and not any(command in node.value for command in COMMANDS)
            ]
    assert found == []
