"""An output that cannot be read is named as such, and so is one that cannot be written. No input is blamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.output_kind import ARTIFACT, CHECKPOINT, check_target
from qformat.artifact.writing.staging import Staging, work_folder
from qformat.converters.convert import convert
from qformat.errors import TargetError
from qformat.training.checkpoints import CheckpointFolder
from qformat.training.starting_checks import check_free
from tests.small_models import write_llama

CANNOT_BE_READ = r"cannot be read: Permission denied\. Correct its permissions, or choose another output"


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output directory and its work directory whose contents cannot be read. Root could read any real one."""
    folder = tmp_path / "out"
    for made in (folder, work_folder(folder)):
        made.mkdir()
        for name in ("qformat.json", "model.safetensors.index.json", "other"):
            (made / name).write_text("{}")

    def refusing(called: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, (str, Path)) and str(path).startswith(str(folder)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return called(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    monkeypatch.setattr(os, "open", refusing(os.open))
    return folder


@pytest.mark.parametrize(
    "read",
    [
        lambda out: check_target(out, replace=True, kind=ARTIFACT),
        lambda out: check_target(out, replace=True, kind=CHECKPOINT),
        lambda out: Staging.begin(out, "fingerprint", disk=Disk()),
        ARTIFACT.identity,
        CHECKPOINT.identity,
        check_free,
        lambda out: CheckpointFolder(out, keep=1).steps(),
    ],
)
def test_an_output_that_cannot_be_read_is_named(read: Callable[[Path], object], out: Path) -> None:
    with pytest.raises(TargetError, match=CANNOT_BE_READ) as caught:
        read(out)
    assert str(caught.value).startswith(str(out))


def test_a_directory_that_cannot_be_emptied_is_named(out: Path) -> None:
    with pytest.raises(TargetError, match="cannot be written: Permission denied") as caught:
        Disk().remove_folder(out)
    assert str(caught.value).startswith(str(out))


class ReadOnlyDisk(Disk):
    def raw_mkdir(self, path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_conversion_blames_the_output_that_it_must_not_write(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    with pytest.raises(TargetError, match="cannot be written: Permission denied") as caught:
        convert(source, tmp_path / "out", disk=ReadOnlyDisk())
    assert str(caught.value).startswith(str(tmp_path / "out"))
    assert str(source) not in str(caught.value)
