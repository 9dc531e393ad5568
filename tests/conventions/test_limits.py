"""No file, function or folder is too large to read: what grows past a limit is divided by its ideas.

Docstrings are not counted: the description of a parameter must not cost a line of code.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from tests.repository import ROOT

MAX_LINES_OF_A_FILE = 350
MAX_LINES_OF_A_FUNCTION = 60
MAX_FILES_OF_A_FOLDER = 13
FOLDERS = ("qformat", "converters", "tools", "tests")


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def n_docstring_lines(tree: ast.AST) -> int:
    """Return how many lines the docstrings of a module or a function take."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node))
    return sum((text.end_lineno or text.lineno) - text.lineno + 1 for text in texts)


def n_lines_of_code(path: Path) -> int:
    text = path.read_text()
    return len(text.splitlines()) - n_docstring_lines(ast.parse(text))


def test_no_file_is_too_long() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): n_lines_of_code(path) for path in files()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES_OF_A_FILE} == {}


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{path.relative_to(ROOT).as_posix()}: {node.name}": (node.end_lineno or node.lineno)
        - node.lineno
        + 1
        - n_docstring_lines(node)
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES_OF_A_FUNCTION} == {}


def test_no_folder_has_too_many_files() -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in files())
    assert {name: count for name, count in counts.items() if count > MAX_FILES_OF_A_FOLDER} == {}
