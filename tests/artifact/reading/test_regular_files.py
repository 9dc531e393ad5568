"""Reading of files: a file that ends too early and a disk that reports an error have different reason codes."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import qformat
from qformat.artifact.reading.regular_files import open_regular, read_chunks, read_exactly
from qformat.converters.convert import convert
from qformat.errors import ArtifactError, Reason, SourceError
from tests.small_models import write_tiny


def read(path: Path, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    with open_regular(path.parent, path.name, error=ArtifactError) as descriptor:
        read_exactly(descriptor, 0, memoryview(data), path=path, error=ArtifactError)
    return bytes(data)


class FailingReads:
    """Replacement of `os.preadv` for which the bytes of a file from an offset on cannot be read."""

    def __init__(self, name: str, first: int) -> None:
        self._name = name
        self._first = first
        self._preadv = os.preadv

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == self._name:
            (buffer,) = buffers
            if offset >= self._first:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            buffers = [buffer[: self._first - offset]]
        return self._preadv(descriptor, buffers, offset)


def test_a_read_error_is_not_reported_as_the_end_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(os, "preadv", FailingReads("file", 60))
    with pytest.raises(ArtifactError) as refused:
        read(path, 100)
    assert refused.value.reason is Reason.UNREADABLE
    assert str(refused.value) == f"{path}: cannot be read at byte 60: {os.strerror(errno.EIO)}. " + ("Check the disk")


def test_the_error_of_a_truncated_file_has_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(60))
    with pytest.raises(ArtifactError) as refused:
        read(path, 100)
    assert refused.value.reason is Reason.TRUNCATED
    assert str(refused.value) == f"{path}: ends at byte 60, expected 40 more bytes. Fetch the file again"


def test_verification_and_conversion_report_the_unreadable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "source")
    convert(source, tmp_path / "artifact")
    (shard,) = (tmp_path / "artifact").glob("*.safetensors")
    with monkeypatch.context() as failing:
        failing.setattr(os, "preadv", FailingReads(shard.name, shard.stat().st_size - 8))
        findings = qformat.verify(tmp_path / "artifact").findings
    assert {(finding.reason, finding.file) for finding in findings} == {(Reason.UNREADABLE, shard.name)}
    (weights,) = source.glob("*.safetensors")
    monkeypatch.setattr(os, "preadv", FailingReads(weights.name, weights.stat().st_size - 8))
    with pytest.raises(SourceError, match="cannot be read at byte") as refused:
        convert(source, tmp_path / "other")
    assert (refused.value.reason, refused.value.path) == (Reason.UNREADABLE, str(weights))


@pytest.mark.parametrize("nbytes", [0, 1, 6, 7, 8, 20, 21])
def test_chunks_are_the_bytes_in_order(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with open_regular(tmp_path, "file", error=ArtifactError) as descriptor:
        chunks = read_chunks(descriptor, 3, 3 + nbytes, chunk_nbytes=7, path=path, error=ArtifactError)
        found = [(position, bytes(part)) for position, part in chunks]
    assert [position for position, _ in found] == list(range(3, 3 + nbytes, 7))
    assert b"".join(part for _, part in found) == bytes(range(3, 3 + nbytes))
