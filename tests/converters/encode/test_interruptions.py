"""Several kills in a row, and disks that cannot exchange directories. tests/cli/faults has a fault at every call.

Whatever happens, OUT is absent, the old artifact or the complete new one; and the same command then ends with the
bytes of a run that nothing disturbed, with nothing left over.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import TargetError
from tests.converters.faulty_disk import OPTIONS, FaultyDisk, Killed, PowerCut, place
from tests.small_models import contents, names_beside


@pytest.fixture(scope="module")
def old(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of another artifact, with one additional file, that is to be replaced."""
    out = tmp_path_factory.mktemp("old") / "out"
    convert(source, out, ConversionOptions(block_size=128, double_quant=False), disk=FaultyDisk())
    assert verify_integrity(out, sha256=True).passed
    (out / "a_note_of_the_user.txt").write_text("mine")
    return contents(out)


def calls_of(source: Path, out: Path, *, workers: int, force: bool) -> list[str]:
    """Return the primitives that a complete conversion calls, in order."""
    disk = FaultyDisk()
    convert(source, out, OPTIONS, workers=workers, force=force, disk=disk)
    return disk.names


def check_and_repeat(
    source: Path, out: Path, *, workers: int, force: bool, old: dict[str, bytes] | None, whole: dict[str, bytes]
) -> None:
    """Check that the target is the old or the new artifact after a fault, and that the same command completes it."""
    standing = contents(out) if out.exists() else None
    assert standing in (old, whole)
    refused: TargetError | None = None
    try:
        convert(source, out, OPTIONS, workers=workers, force=force, disk=FaultyDisk())
    except TargetError as caught:
        refused = caught
    if refused is not None:
        # The fault came behind the very last mark of the finished run: it is as if the command were given twice.
        assert standing == whole
        assert not force
        assert "already exists" in str(refused)
    assert contents(out) == whole
    assert names_beside(out) == {out.name}


def test_a_second_and_a_third_kill_during_retries_change_nothing(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    n_calls = len(calls_of(source, tmp_path / "out", workers=1, force=False))
    for k in range(0, n_calls, 5):
        parent = tmp_path / str(k)
        parent.mkdir()
        out = parent / "out"
        for repetition in range(3):
            with contextlib.suppress(Killed, TargetError):  # or it is finished before the kill
                convert(source, out, OPTIONS, workers=1, disk=PowerCut(k, seed=k + repetition))
            assert not out.exists() or contents(out) == whole
        check_and_repeat(source, out, workers=1, force=False, old=None, whole=whole)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_without_atomic_exchange_a_kill_at_any_call_still_loses_neither_artifact(
    code: int, source: Path, whole: dict[str, bytes], old: dict[str, bytes], tmp_path: Path
) -> None:
    """The old artifact is moved aside before the new one is renamed: the target may be absent, but is never mixed."""

    class NoExchange(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name == "raw_exchange":
                raise OSError(code, os.strerror(code))
            return super().perform(name, arguments)

    rehearsal = NoExchange()
    convert(source, place(tmp_path / "r" / "out", old), OPTIONS, workers=1, force=True, disk=rehearsal)
    assert contents(tmp_path / "r" / "out") == whole
    n_absent = 0
    for k in range(rehearsal.n_calls // 2, rehearsal.n_calls):
        out = place(tmp_path / str(k) / "out", old)
        with pytest.raises(Killed):
            convert(source, out, OPTIONS, workers=1, force=True, disk=NoExchange(k, "kill"))
        if not out.exists():
            n_absent += 1
            assert contents(out.with_name("out.partial") / "replaced") == old
        else:
            assert contents(out) in (old, whole)
        convert(source, out, OPTIONS, workers=1, force=True, disk=NoExchange())
        assert contents(out) == whole
        assert names_beside(out) == {"out"}
    assert n_absent == 1
