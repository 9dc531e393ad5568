"""Commands that only read leave no file: not beside their inputs, nor in the working, cache or temporary folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.cli.faults.injection import Interceptor
from tests.cli.faults.running import Case
from tests.cli.faults.table import READING, Form
from tests.hub_stand_in import Hub


def snapshot(*folders: Path) -> dict[Path, tuple[int, bytes]]:
    """Return the time of the last change of every file and directory, and its bytes."""
    paths = [path for folder in folders for path in (folder, *sorted(folder.rglob("*")))]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


@pytest.mark.parametrize("name", READING)
def test_a_command_that_reads_changes_nothing(
    name: str, hub: Hub, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(READING[name], given, tmp_path, monkeypatch, code=1 if name == "seal" else 0)  # seal found changes to accept


def test_publish_writes_no_file(hub: Hub, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = READING["publish --dry-run"].removesuffix(" --dry-run")
    check(publish, given, tmp_path, monkeypatch)
    assert hub.requests("/commit/")


def check(arguments: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, code: int = 0) -> None:
    for folder in ("temporary", "case-cache"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    case = Case(Form(arguments, makes=""), given, tmp_path / "case")
    case.run()  # compiled kernels and imported modules may be cached beside the code
    for path in (tmp_path / "temporary").iterdir():
        raise AssertionError(f"{path}: is left")
    before = snapshot(given, case.folder, tmp_path / "case-cache")
    disk = Interceptor()
    outcome = case.run(disk)
    assert outcome.code == code, outcome.told
    assert snapshot(given, case.folder, tmp_path / "case-cache") == before
    assert disk.n_calls == 0
