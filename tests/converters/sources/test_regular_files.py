"""Only regular files are opened: inside the directory, or through the links of the Hub's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qformat.converters.convert import convert, plan
from qformat.errors import Reason, SourceError
from tests.converters.refused_source import refusal
from tests.converters.unusual_paths import (
    as_dangling_link,
    as_device,
    as_fifo,
    as_folder,
    as_link_out,
    as_link_to_itself,
    as_link_to_zero,
    as_link_within,
)
from tests.small_models import INDEX, SIDE_FILES, contents, write_tiny


def test_a_folder_that_does_not_exist_or_is_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("missing", "file", "x" * 5000, "file/below"):
        with pytest.raises(SourceError) as refused:
            plan(tmp_path / name)
        assert refused.value.reason is Reason.MISSING_FILE


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "LICENSE", "tokenizer.json", INDEX])
@pytest.mark.parametrize(
    "make",
    [
        as_folder,
        as_fifo,
        as_device,
        as_link_out,
        as_link_to_zero,
        as_link_to_itself,
        as_dangling_link,
        as_link_within,
    ],
)
def test_only_regular_files_inside_the_folder_are_opened(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "source", side_files=SIDE_FILES)
    if name == INDEX:
        (source / "model.safetensors").unlink()
    (source / name).unlink(missing_ok=True)
    make(source / name)
    error = refusal(source)
    assert error.reason in {Reason.NOT_A_REGULAR_FILE, Reason.PATH_ESCAPES}, error
    assert Path(error.path) == source / name


def hub_cache(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """Lay files out as huggingface_hub does: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, (name, data) in enumerate(files.items()):
        (repository / "blobs" / f"{number:040x}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_the_links_of_the_hub_cache_are_followed(single: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, contents(single))
    convert(single, tmp_path / "from folder")
    convert(snapshot, tmp_path / "from cache")
    assert contents(tmp_path / "from folder") == contents(tmp_path / "from cache")


def test_the_links_of_the_hub_cache_are_followed_through_a_link_to_the_cache(single: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, contents(single))
    (tmp_path / "linked").symlink_to(snapshot.parents[1])
    convert(tmp_path / "linked" / "snapshots" / snapshot.name, tmp_path / "out")
    (tmp_path / "direct").symlink_to(snapshot)
    with pytest.raises(SourceError) as refused:
        plan(tmp_path / "direct")  # `../../blobs` is taken from the name given: a link to a snapshot hides the cache
    assert refused.value.reason is Reason.PATH_ESCAPES


@pytest.mark.parametrize(
    "target",
    ["/dev/zero", "../../../outside", "../../blobs/../../outside", "../../blobs/sub/blob", "../../blobs"],
)
def test_a_hub_cache_with_links_that_lead_elsewhere_is_rejected(target: str, single: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"{}")
    snapshot = hub_cache(tmp_path, contents(single))
    (snapshot.parents[1] / "blobs" / "sub").mkdir()
    (snapshot.parents[1] / "blobs" / "sub" / "blob").write_bytes(b"{}")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(target)
    assert refusal(snapshot).reason in {Reason.PATH_ESCAPES, Reason.NOT_A_REGULAR_FILE}


def test_a_blob_that_is_itself_a_link_or_a_fifo_is_rejected(single: Path, tmp_path: Path) -> None:
    for number, make in enumerate((as_fifo, as_link_to_zero, as_link_to_itself)):
        folder = tmp_path / str(number)
        folder.mkdir()
        snapshot = hub_cache(folder, contents(single))
        blob = snapshot.parents[1] / "blobs" / os.path.basename(os.readlink(snapshot / "model.safetensors"))
        blob.unlink()
        make(blob)
        assert refusal(snapshot).reason in {Reason.PATH_ESCAPES, Reason.NOT_A_REGULAR_FILE}
