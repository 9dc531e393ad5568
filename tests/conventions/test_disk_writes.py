"""Everything that stays on disk goes through `Disk`, so that the tests of faults can make it fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.repository import ROOT

METHODS = {
    "hardlink_to", "mkdir", "rename", "rmdir", "save_file", "save_pretrained", "symlink_to", "tofile", "touch",
    "unlink", "write_bytes", "write_text",
}  # fmt: skip
"""Functions and methods that change files, whatever they are called on."""

OF_MODULES = {
    "os": {"chmod", "fdatasync", "fsync", "ftruncate", "link", "makedirs", "mkfifo", "posix_fallocate", "pwrite",
           "pwritev", "remove", "removedirs", "renames", "replace", "symlink", "truncate", "utime", "write"},
    "shutil": {"chown", "copy", "copy2", "copyfile", "copyfileobj", "copytree", "move", "rmtree", "unpack_archive"},
    "tempfile": {"NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile", "mkdtemp", "mkstemp"},
    "torch": {"save"},
    "np": {"save", "savez", "savez_compressed"},
}  # fmt: skip
"""Functions of modules that change files. Other objects have methods of these names, too."""

_COMMON = {"copy", "link", "remove", "replace", "save", "write"}
IMPORTED = {name for names in OF_MODULES.values() for name in names} - _COMMON
"""The same, imported by name, except common words."""

DISK = "qformat/artifact/writing/disk.py"

ALLOWED = {
    # Temporary folders of files that other programs read, removed before the function returns.
    "qformat/model/rules/expected_tensors.py": {"TemporaryDirectory", "write_bytes"},
    "qformat/hub/signature.py": {"TemporaryDirectory", "write_bytes"},
    "qformat/hub/publishing/publish.py": {"TemporaryDirectory", "write_bytes"},
    "qformat/cli/checks/model_comparison.py": {"TemporaryDirectory", "write_bytes", "open"},
    "converters/sources/gguf/tokenizer.py": {"TemporaryDirectory", "save_pretrained"},
    "converters/encode/calibrated.py": {"TemporaryDirectory", "write_bytes"},
    # Shows before the work whether a directory can be written, and leaves nothing there.
    "qformat/cli/options.py": {"TemporaryFile"},
    # Files that other libraries write into the folder of an unfinished checkpoint, which is then synced and renamed.
    "qformat/quality/tuning/steps.py": {"save_file"},
    "qformat/training/trainer.py": {"save_pretrained"},
    # `save_pretrained` of transformers, which a caller of the library has asked for.
    "qformat/model/loaded_model.py": {"save_pretrained"},
}
"""The other places, with the functions that they call."""


def calls_that_write(tree: ast.AST) -> Iterator[str]:
    """Yield the names of the called functions that write."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = getattr(function, "attr", None) or getattr(function, "id", "")
        if name == "open":
            writes = opens_for_writing(node)
        elif isinstance(function, ast.Attribute):
            of_module = OF_MODULES.get(getattr(function.value, "id", ""), set())
            writes = name in of_module or (name in METHODS and not is_disk(function.value))
        else:
            writes = name in (METHODS | IMPORTED) - {"rename"}
        if writes:
            yield name


def opens_for_writing(call: ast.Call) -> bool:
    """Return whether a mode among the arguments of `open` is one of writing, or a flag of `os.open` is."""
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    flags = {node.attr for argument in arguments for node in ast.walk(argument) if isinstance(node, ast.Attribute)}
    if "devnull" in flags:
        return False
    modes = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
    writes = any(isinstance(mode, str) and len(mode) <= 3 and {*mode} & {*"wax+"} for mode in modes)
    return writes or bool(flags & {"O_CREAT", "O_RDWR", "O_WRONLY", "O_TRUNC", "O_APPEND"})


def is_disk(value: ast.expr) -> bool:
    """Return whether an expression is a `Disk`: a variable or an attribute with that name, or a new one."""
    name = getattr(value, "attr", None) or getattr(value, "id", None)
    return name in {"disk", "_disk"} or (isinstance(value, ast.Call) and getattr(value.func, "id", None) == "Disk")


def found_in(path: Path) -> set[str]:
    return {*calls_that_write(ast.parse(path.read_text()))}


def test_files_are_written_through_the_disk_except_in_the_stated_places() -> None:
    paths = [path for folder in ("qformat", "converters") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): found_in(path) for path in paths}
    assert found.pop(DISK)
    assert {name: calls for name, calls in found.items() if calls} == ALLOWED


def test_every_way_to_write_is_recognised() -> None:
    for text in (
        "open(path, 'w')",
        "path.open('r+b')",
        "open(path, mode='ab')",
        "os.open(path, os.O_RDONLY | os.O_CREAT)",
        "os.replace(a, b)",
        "shutil.rmtree(a)",
        "path.write_text('')",
        "torch.save(x, path)",
    ):
        assert {*calls_that_write(ast.parse(text))}, text
    for text in ("open(path, 'rb')", "text.replace('a', 'b')", "disk.rename(a, b)", "self._disk.sync(a)", "open(path)"):
        assert not {*calls_that_write(ast.parse(text))}, text
