"""After a disk is full, fails or loses power, the next fetch creates the published artifact."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from qformat.errors import TargetError
from tests.converters.faulty_disk import DiskWithRoom, FaultyDisk, Killed, PowerCut
from tests.hub.fetching import BODY, do_fetch
from tests.hub_stand_in import Hub
from tests.small_models import contents, names_beside


def test_a_full_disk_is_rejected_before_a_byte_is_fetched(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="not enough disk space"):
        do_fetch(tmp_path / "out", disk=DiskWithRoom(1000))
    assert not hub.requests(BODY)
    assert names_beside(tmp_path / "out") == {"small-nf4"}


def calls_of(out: Path) -> list[str]:
    disk = FaultyDisk()
    do_fetch(out, disk=disk, connections=1)
    return disk.names


def faults(names: list[str], stride: int) -> list[tuple[int, str]]:
    """Every n-th call with a suitable fault, and all of the last calls, which finish the directory."""
    chosen = [*range(0, len(names), stride), *range(len(names) - 12, len(names))]
    return [(at, fault) for at in dict.fromkeys(chosen) for fault in ("kill", "ENOSPC", "EIO")]


def check_faults(published: dict[str, bytes], tmp_path: Path, stride: int) -> None:
    names = calls_of(tmp_path / "counted")
    for number, (at, fault) in enumerate(faults(names, stride)):
        folder = tmp_path / f"fault{number}"
        folder.mkdir()
        out = folder / "out"
        with contextlib.suppress(Killed, TargetError):
            do_fetch(out, disk=FaultyDisk(at, fault), connections=1)
        assert not out.exists() or contents(out) == published
        if not out.exists():
            do_fetch(out, disk=FaultyDisk())
        elif out.with_name("out.partial").exists():
            # After a crash in the very last step, the command cleans up and may report that the artifact is complete.
            with contextlib.suppress(TargetError):
                do_fetch(out, disk=FaultyDisk())
        assert contents(out) == published, (at, names[at], fault)
        assert names_beside(out) == {"out"}


def test_a_fault_of_the_disk_at_some_calls_loses_nothing(hub: Hub, published: dict[str, bytes], tmp_path: Path) -> None:
    check_faults(published, tmp_path, stride=17)


@pytest.mark.slow
def test_a_fault_of_the_disk_at_every_call_loses_nothing(hub: Hub, published: dict[str, bytes], tmp_path: Path) -> None:
    check_faults(published, tmp_path, stride=1)


def test_a_power_cut_loses_only_what_was_not_on_the_disk(hub: Hub, published: dict[str, bytes], tmp_path: Path) -> None:
    n_calls = len(calls_of(tmp_path / "counted"))
    for seed, at in enumerate(range(20, n_calls, 23)):
        folder = tmp_path / f"cut{seed}"
        folder.mkdir()
        with pytest.raises(Killed):
            do_fetch(folder / "out", disk=PowerCut(at, seed), connections=2)
        if not (folder / "out").exists():
            do_fetch(folder / "out", disk=FaultyDisk())
        assert contents(folder / "out") == published
