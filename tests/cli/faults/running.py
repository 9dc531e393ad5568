"""Runs a form of a command in a folder of its own, on a faulty disk, and reads what it made."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from qformat.cli.main import run
from tests.cli.faults.injection import Interceptor, on
from tests.cli.faults.table import Form
from tests.converters.faulty_disk import Killed

_MEASURED = re.compile(rb"[0-9][0-9.,]*")
"""Numbers in pages and logs, some of which are measured times."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Its exit code, None if it was killed.
        told: What it printed to stderr.
    """

    code: int | None
    told: str

    @property
    def error(self) -> str:
        """The only line that reports an error."""
        (line,) = [line for line in self.told.splitlines() if line.startswith("Error: ")]
        return line


class Case:
    """A folder in which a form of a command runs, once or several times.

    Args:
        form: The form.
        given: Folder of the inputs.
        folder: Folder to make, with copies of the inputs that the command changes.
    """

    def __init__(self, form: Form, given: Path, folder: Path) -> None:
        self.form = form
        self.folder = folder
        self._given = given
        folder.mkdir(parents=True)
        for name in form.copies:
            shutil.copytree(given / name, folder / name)

    def run(self, disk: Interceptor | None = None) -> Outcome:
        """Run the command. Later runs resume as a user would."""
        arguments = shlex.split(self.form.arguments.format(given=self._given))
        if self.form.resumes is not None:
            pattern, option = self.form.resumes
            arguments += [option] * any(self.folder.glob(pattern))
        told = io.StringIO()
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(self.folder)
            patched.setenv("XDG_CACHE_HOME", str(self.folder.with_name(self.folder.name + "-cache")))
            with (
                contextlib.redirect_stderr(told),
                contextlib.redirect_stdout(io.StringIO()),
                on(disk or Interceptor(), libraries=self.form.loads_model),
            ):
                try:
                    code: int | None = run(arguments)
                except Killed:
                    code = None
        return Outcome(code, told.getvalue())

    def made(self) -> dict[str, bytes] | None:
        """Return what has appeared under the final name: its files by path, None if there is nothing."""
        path = self.folder / self.form.makes
        return None if not os.path.lexists(path) else _files(path)

    def everything(self) -> dict[str, bytes]:
        """Return every file of the folder by path."""
        return _files(self.folder)


def _files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: _without_times(path)}
    return {str(file.relative_to(path)): _without_times(file) for file in sorted(path.rglob("*")) if file.is_file()}


def _without_times(path: Path) -> bytes:
    data = path.read_bytes()
    return _MEASURED.sub(b"#", data) if path.suffix in {".html", ".jsonl"} else data
