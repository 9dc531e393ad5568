"""Disks that are read-only or too small: detected before the first byte if possible."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.artifact.writing.disk import Disk, allocated_nbytes
from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.errors import TargetError
from tests.converters.encode.refused_target import refusal
from tests.converters.faulty_disk import OPTIONS, DiskWithRoom, FaultyDisk, interrupt
from tests.small_models import contents, names_beside


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_target_that_cannot_be_written_is_reported(code: int, source: Path, parent: Path) -> None:
    class ReadOnly(Disk):
        def raw_mkdir(self, path: Path) -> None:
            raise OSError(code, os.strerror(code))

    message = refusal(source, parent / "out", disk=ReadOnly())
    assert str(parent / "out.partial") in message
    assert "Choose a directory with write permission" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_rejected(source: Path, parent: Path) -> None:
    parent.chmod(0o500)
    try:
        assert "Choose a directory with write permission" in refusal(source, parent / "out")
    finally:
        parent.chmod(0o700)


def test_insufficient_space_is_detected_before_the_first_byte(source: Path, parent: Path) -> None:
    needed = plan(source).nbytes
    message = refusal(source, parent / "out", disk=DiskWithRoom(needed - 1))
    assert f"needs {needed:,} bytes, " in message
    assert f"{needed - 1:,} bytes are free" in message
    assert str(parent / "out") in message
    convert(source, parent / "out", disk=DiskWithRoom(needed))


def test_space_that_is_already_staged_is_not_required_again(source: Path, parent: Path) -> None:
    out = parent / "out"
    needed = plan(source, OPTIONS).nbytes
    work = interrupt(source, out, n_done=4)
    assert allocated_nbytes(work) > 0
    convert(source, out, OPTIONS, disk=DiskWithRoom(max(0, needed - allocated_nbytes(work))))
    assert verify_integrity(out).passed


def test_a_finished_run_is_recognised_without_free_space(source: Path, parent: Path) -> None:
    """The run was killed right after the rename and the disk is full now, so only the cleanup is left."""
    out = parent / "out"

    class NoCleaning(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name in {"raw_unlink", "raw_rmdir"}:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().perform(name, arguments)

    with pytest.raises(TargetError):
        convert(source, out, disk=NoCleaning())
    assert verify_integrity(out).passed
    summary = convert(source, out, disk=DiskWithRoom(0))
    assert summary.already_complete
    assert names_beside(out) == {"out"}


def test_a_conversion_resumes_after_the_disk_filled_up(source: Path, parent: Path) -> None:
    """As on a tmpfs one page smaller than the artifact: writes fail once the allowed number of bytes is used."""
    out = parent / "out"
    planned = plan(source, OPTIONS)

    class Full(FaultyDisk):
        written = 0

        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name in {"raw_pwrite", "raw_write"}:
                data = arguments[1]
                assert isinstance(data, memoryview)
                if self.written + len(data) > planned.nbytes - 4096:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.written += len(data)
            return super().perform(name, arguments)

    with pytest.raises(TargetError) as refused:
        convert(source, out, OPTIONS, disk=Full())
    message = str(refused.value)
    assert str(parent / "out.partial") in message
    assert f"the output needs {planned.nbytes:,} bytes in total" in message
    assert "are free" in message
    assert "it resumes" in message
    assert not out.exists()
    convert(source, out, OPTIONS)
    convert(source, parent / "undisturbed", OPTIONS)
    assert contents(out) == contents(parent / "undisturbed")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs to write to")
def test_the_output_may_be_on_another_file_system_than_the_source(source: Path, parent: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        convert(source, Path(folder) / "out")
        convert(source, Path(folder) / "out", ConversionOptions(block_size=32), force=True)
        assert verify_integrity(Path(folder) / "out").passed
        assert os.listdir(folder) == ["out"]
