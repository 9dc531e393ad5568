"""Atomic replacement of a file or directory: after any failure, only the old one or the new one exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.artifact.writing.disk import Disk
from qformat.errors import TargetError
from tests.converters.faulty_disk import FaultyDisk, Killed, PowerCut

OLD, NEW = b"the old bytes", b"the new bytes, which are more"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file.json").write_bytes(OLD)
    return tmp_path / "file.json"


def test_an_existing_or_missing_file_gets_the_new_bytes(path: Path) -> None:
    Disk().replace_file(path, NEW)
    Disk().replace_file(path.with_name("other.json"), NEW)
    assert path.read_bytes() == path.with_name("other.json").read_bytes() == NEW
    assert {entry.name for entry in path.parent.iterdir()} == {"file.json", "other.json"}


def test_the_new_bytes_are_synced_before_the_rename(path: Path) -> None:
    disk = FaultyDisk()
    disk.replace_file(path, NEW)
    assert disk.names == ["raw_open", "raw_truncate", "raw_pwrite", "raw_fsync", "raw_rename", "raw_fsync"]


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "nothing written from here on"])
@pytest.mark.parametrize("call", range(6))
def test_a_failed_call_leaves_only_the_old_or_the_new_file_in_the_directory(path: Path, call: int, fault: str) -> None:
    try:
        FaultyDisk(call, fault).replace_file(path, NEW)
    except TargetError:
        pass
    else:
        assert fault == "nothing written from here on"
        assert path.read_bytes() == NEW
    assert path.read_bytes() in (OLD, NEW)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", range(6))
def test_a_power_cut_leaves_the_old_file_or_the_new_one(path: Path, call: int) -> None:
    with pytest.raises(Killed):
        PowerCut(call, seed=call).replace_file(path, NEW)
    assert path.read_bytes() in (OLD, NEW)


def test_a_directory_replaces_an_existing_one_of_the_same_name(tmp_path: Path) -> None:
    for name, data in (("made", NEW), ("final", OLD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(data)
    Disk().replace_folder(tmp_path / "made", tmp_path / "final")
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "file").read_bytes() == NEW
