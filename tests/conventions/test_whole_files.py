"""No file is read whole without a limit: a FIFO, a device or a file of any size must not reach memory."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.repository import ROOT

ALLOWED = {
    "qformat/named_files.py": "the place that has the limit",
    "qformat/model/memory.py": "files of the kernel",
    "qformat/kernels/openmp.py": "files of the kernel",
    "qformat/cli/waiting.py": "files of the kernel",
    "qformat/model/text/render_process.py": "files of the kernel",
    "qformat/model/rules/expected_tensors.py": "standard input of a child, which qformat writes",
    "qformat/training/adapter/pattern_matcher.py": "standard input of a child, which qformat writes",
    "qformat/cli/checks/model_comparison.py": "answer of a child of qformat",
}

OWN_READERS = {"self", "metrics", "hidden"}
"""Names of objects of qformat with a method `read`."""

WHOLE_OF_A_PATH = {"read_bytes", "read_text"}
WHOLE_OF_A_FILE = {"read", "readlines", "readall"}
PARSERS_OF_FILES = {("json", "load"), ("tomllib", "load"), ("pickle", "load")}


def whole_reads(tree: ast.AST) -> Iterator[int]:
    """Yield the lines of calls that read a file to its end."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        owner, name = call.func.value.id if isinstance(call.func.value, ast.Name) else "", call.func.attr
        of_path = name in WHOLE_OF_A_PATH and all(isinstance(argument, ast.Constant) for argument in call.args)
        of_file = name in WHOLE_OF_A_FILE and not call.args and owner not in OWN_READERS
        if of_path or of_file or (owner, name) in PARSERS_OF_FILES:
            yield call.lineno


def found_in(folder: str) -> Iterator[str]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name not in ALLOWED:
            yield from (f"{name}:{line}" for line in whole_reads(ast.parse(path.read_text(encoding="utf-8"))))


def test_no_file_is_read_whole_without_a_limit() -> None:
    found = [*found_in("qformat"), *found_in("converters")]
    assert not found, "use qformat.named_files.read_named, or read in parts"


def test_whole_reads_are_recognised() -> None:
    lines = [
        "path.read_bytes()", "(folder / name).read_text('utf-8', errors='replace')", "file.read()", "sys.stdin.read()",
        "json.load(file)", "tomllib.load(file)", "file.readlines()",
    ]  # fmt: skip
    assert list(whole_reads(ast.parse("\n".join(lines)))) == list(range(1, len(lines) + 1))
    assert not list(whole_reads(ast.parse("file.read(4096)\nself.read()\nheader.read_text(read_into, path=path)")))
