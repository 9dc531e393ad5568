"""Files that options name: a pipe, a device, a directory or a file beyond the limit is refused before it is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qformat.converters.rules.recipe import load_recipe
from qformat.errors import UsageError
from qformat.hub.signature import public_key_of
from qformat.named_files import MAX_OPTION_FILE_NBYTES, open_named, read_named
from qformat.training.settings import read_toml


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "file")
    return folder / "file"


def linked_device(folder: Path) -> Path:
    (folder / "file").symlink_to("/dev/zero")
    return folder / "file"


def directory(folder: Path) -> Path:
    (folder / "file").mkdir()
    return folder / "file"


def large(folder: Path) -> Path:
    with (folder / "file").open("wb") as file:
        file.truncate(2**40)
    return folder / "file"


UNSUITABLE = {
    fifo: "it is a pipe or a device. Write it to a file first",
    linked_device: "it is a pipe or a device. Write it to a file first",
    directory: "it is a directory",
    large: "it has 1,099,511,627,776 bytes, and the limit is",
}

OPTIONS: dict[str, Callable[[Path], object]] = {
    "--config": read_toml,
    "--recipe": load_recipe,
    "--sign-key": public_key_of,
}


@pytest.mark.parametrize("made", UNSUITABLE)
def test_what_is_no_small_regular_file_is_not_read(made: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=UNSUITABLE[made]):
        read_named(made(tmp_path), max_nbytes=1000)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("made", UNSUITABLE)
def test_an_option_refuses_what_is_no_small_regular_file(
    made: Callable[[Path], Path], option: str, tmp_path: Path
) -> None:
    if option == "--sign-key":
        pytest.importorskip("model_signing")
    path = made(tmp_path)
    with pytest.raises(UsageError) as caught:
        OPTIONS[option](path)
    assert str(caught.value).startswith(f"{path}: ")
    assert UNSUITABLE[made] in str(caught.value)


def test_a_file_of_the_limit_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"#" * MAX_OPTION_FILE_NBYTES)
    assert read_named(path, max_nbytes=MAX_OPTION_FILE_NBYTES) == path.read_bytes()
    path.write_bytes(b"#" * (MAX_OPTION_FILE_NBYTES + 1))
    with pytest.raises(OSError, match="1,048,577 bytes, and the limit is 1,048,576"):
        read_named(path, max_nbytes=MAX_OPTION_FILE_NBYTES)


def test_a_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_named(tmp_path / "link", max_nbytes=100) == b"content"


def test_a_file_that_is_refused_is_closed_again(tmp_path: Path) -> None:
    path = fifo(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="pipe"):
            open_named(path)
    assert len(os.listdir("/proc/self/fd")) == before
