"""An output that cannot be written is refused before the work, and nothing changes."""

from __future__ import annotations

import errno
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.cli.faults.injection import ReadOnly
from tests.cli.faults.running import Case
from tests.cli.faults.table import FORMS
from tests.hub_stand_in import Hub


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=["read-only", "no permission"])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_cannot_be_written_is_reported_before_the_work(
    form: str, code: int, hub: Hub, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(FORMS[form], given, tmp_path / "case")
    before = case.everything()
    begun: list[str] = []
    for name in case.form.work:
        note_calls(name, begun, monkeypatch)
    forbid_writing(case.folder, code, monkeypatch)
    outcome = case.run(ReadOnly(case.folder, code))
    assert outcome.code in {1, 2}, outcome.told
    assert "Traceback" not in outcome.told
    assert case.form.makes.split("/")[0] in outcome.error
    assert "Choose a" in outcome.error
    assert case.everything() == before
    assert not begun


def note_calls(name: str, begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a function note that it was called, before it does its work."""
    module, _, attribute = name.rpartition(".")
    holder: Any = importlib.import_module(module) if module.islower() else None
    if holder is None:
        holder = getattr(importlib.import_module(module.rpartition(".")[0]), module.rpartition(".")[2])
    work = getattr(holder, attribute)

    def noted(*arguments: Any, **named: Any) -> Any:
        begun.append(name)
        return work(*arguments, **named)

    monkeypatch.setattr(holder, attribute, noted)


def forbid_writing(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `os.access` and temporary files do what they do in a read-only directory, for root, too."""
    access, temporary_file = os.access, tempfile.TemporaryFile

    def refused(path: Any, mode: int, **named: Any) -> bool:
        inside = Path(path).absolute().is_relative_to(folder)
        return not (inside and mode & os.W_OK) and access(path, mode, **named)

    def temporary(*arguments: Any, dir: Any = None, **named: Any) -> Any:
        if dir is not None and Path(dir).absolute().is_relative_to(folder):
            raise OSError(code, os.strerror(code))
        return temporary_file(*arguments, dir=dir, **named)

    monkeypatch.setattr(os, "access", refused)
    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
