"""Docstrings say what a caller must know: every parameter of a public function that has several is described."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.repository import ROOT

ROOMS = ("converters", "qformat")
DIALECT = (
    r"^Of ",  # a fragment without a subject
    r"\bis said\b|\bare said\b",  # is reported
    r", by name\b",  # is listed
    r"\bas ever\b",
    r"\b(is|are) no (?!longer|more|less|such)",  # is not a
    r"\bstands? there\b|\bstands? under\b",  # exists
    r"\bat home\b",
    r"\bwhoever\b",
    r"\bwithstands?\b",  # detects
    r"\bmade good\b",
    r"\blikewise\b",
    r"\bwhat becomes of\b",
)
"""Phrases of the private dialect that the first texts were written in, and that a stranger had to read twice."""


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a module and the methods of its public classes that a caller outside may use."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (
                item for item in node.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
            )


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [item.arg for item in arguments if item.arg not in {"self", "cls"} and not item.arg.startswith("_")]


def described(text: str) -> set[str]:
    """Return the names that the `Args:` section of a docstring describes."""
    section = re.search(r"^Args:\n((?:(?: .*)?\n?)*)", text, re.MULTILINE)
    lines = re.findall(r"^    \*{0,2}(\w+(?:, \w+)*):", section[1], re.MULTILINE) if section else []
    return {name for names in lines for name in names.split(", ")}


def test_every_parameter_of_a_public_function_is_described() -> None:
    lacking = {}
    for path in modules():
        for function in public_functions(ast.parse(path.read_text())):
            names = parameters(function)
            text = ast.get_docstring(function)
            if len(names) > 1 and text is not None and (missing := set(names) - described(text)):
                lacking[f"{path.relative_to(ROOT)}: {function.name}"] = sorted(missing)
    assert lacking == {}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the strings of a module and its comments, with their lines."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.search(r"(?:^|\s)# (.*)", line):
            yield number, match[1]


def test_no_text_is_in_the_private_dialect() -> None:
    pattern = re.compile("|".join(DIALECT), re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}: {text[:60]!r}"
        for path in modules()
        for line, text in texts(path)
        if (match := pattern.search(text))
    ]
    assert found == []
