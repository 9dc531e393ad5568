"""Commands print through `qformat.cli.display`, which shows control characters as escapes."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.repository import ROOT

PRINTING = {
    ("click", "echo"), ("click", "secho"), ("click", "echo_via_pager"), ("click", "style"), ("click", "confirm"),
    ("click", "prompt"), ("sys", "__stdout__"), ("sys", "__stderr__"), ("traceback", "print_exc"),
    ("stdout", "write"), ("stderr", "write"), ("problem", "show"),
}  # fmt: skip
"""Object and attribute of calls that print past the filter."""

ALLOWED = {
    "qformat/cli/display.py": {"echo"},
    "qformat/model/rules/expected_tensors.py": {"write"},  # the answer of a process to the one that started it
}


def printing(path: Path) -> set[str]:
    """Return the names of what a file calls to print past the filter."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id == "print":
            found.add("print")
        if isinstance(function, ast.Attribute):
            owner = function.value
            names = {part.attr if isinstance(part, ast.Attribute) else part.id for part in ast.walk(owner)
                     if isinstance(part, (ast.Attribute, ast.Name))}  # fmt: skip
            found |= {attribute for name, attribute in PRINTING if function.attr == attribute and name in names}
    return found


def test_nothing_is_printed_past_the_filter() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): names
        for folder in ("qformat", "converters")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (names := printing(path))
    }
    assert found == ALLOWED
