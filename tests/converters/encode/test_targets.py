"""The output's target: what is rejected before any work, what is replaced, and what is left on the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qformat.artifact.reading.verify import verify_integrity
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.staging import Staging
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import TargetError, UsageError
from tests.converters.encode.refused_target import refusal
from tests.converters.faulty_disk import FaultyDisk, place
from tests.converters.unusual_paths import (
    as_dangling_link,
    as_fifo,
    as_file,
    as_link_to_a_file,
    as_link_to_an_empty_folder,
    as_link_to_itself,
)
from tests.small_models import contents, names_beside


def test_an_existing_artifact_is_rejected_and_with_force_replaced_completely(source: Path, parent: Path) -> None:
    out = parent / "out"
    convert(source, out, ConversionOptions(block_size=128))
    (out / "note.txt").write_text("mine")
    old = contents(out)
    assert "already exists" in refusal(source, out)
    assert contents(out) == old
    convert(source, out, force=True)
    assert verify_integrity(out, sha256=True).passed
    assert "note.txt" not in contents(out)
    convert(source, parent / "fresh")
    assert contents(out) == contents(parent / "fresh")
    assert names_beside(out) == {"out", "fresh"}


def test_a_damaged_artifact_is_replaced_like_an_intact_one(source: Path, parent: Path) -> None:
    out = place(parent / "out", {"qformat.json": b"garbage", "model-00001-of-00009.safetensors": b"rest"})
    assert "already exists" in refusal(source, out)
    convert(source, out, force=True)
    assert verify_integrity(out).passed


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_is_not_an_artifact_is_rejected_even_with_force(
    force: bool, source: Path, parent: Path
) -> None:
    out = place(parent / "out", {"thesis.txt": b"years of work"})
    assert "is not an artifact" in refusal(source, out, force=force)
    assert contents(out) == {"thesis.txt": b"years of work"}


def test_a_folder_named_like_a_manifest_does_not_make_an_artifact(source: Path, parent: Path) -> None:
    (parent / "out" / "qformat.json").mkdir(parents=True)
    assert "is not an artifact" in refusal(source, parent / "out", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_directory_is_treated_like_a_missing_one(force: bool, source: Path, parent: Path) -> None:
    (parent / "out").mkdir()
    convert(source, parent / "out", force=force)
    assert verify_integrity(parent / "out").passed
    assert names_beside(parent / "out") == {"out"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "make",
    [as_file, as_link_to_a_file, as_link_to_an_empty_folder, as_dangling_link, as_link_to_itself, as_fifo],
)
def test_a_target_that_is_not_a_directory_is_rejected_even_with_force(
    make: Callable[[Path], None], force: bool, source: Path, parent: Path
) -> None:
    make(parent / "out")
    assert "is not a directory" in refusal(source, parent / "out", force=force)


def test_a_link_to_an_artifact_is_not_followed(source: Path, parent: Path) -> None:
    convert(source, parent / "real")
    before = contents(parent / "real")
    (parent / "out").symlink_to("real")
    assert "is not a directory" in refusal(source, parent / "out", force=True)
    assert contents(parent / "real") == before


def test_a_missing_parent_is_not_created(source: Path, parent: Path) -> None:
    assert "Create it first" in refusal(source, parent / "missing" / "out")
    assert not (parent / "missing").exists()


def test_a_file_in_place_of_the_parent_is_rejected(source: Path, parent: Path) -> None:
    as_file(parent / "file")
    assert "does not exist or is not a directory" in refusal(source, parent / "file" / "out")


@pytest.mark.parametrize("force", [False, True])
def test_output_inside_the_source_and_source_inside_the_output_are_rejected(
    force: bool, source: Path, parent: Path
) -> None:
    for out in (source, source / "out", source / "deep" / "out", source / ".." / "source" / "out"):
        assert "is inside the source" in refusal(source, out, force=force)
    assert "contains the source" in refusal(source, source.parent, force=force)
    (parent / "link").symlink_to(source)
    assert "is inside the source" in refusal(source, parent / "link" / "out", force=force)
    (parent / "up").symlink_to(source.parent)
    assert "contains the source" in refusal(source, parent / "up", force=force)


@pytest.mark.parametrize("out", ["", ".", "/", "..", "../.."])
def test_a_path_without_a_final_name_is_rejected(
    out: str, source: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parent)
    with pytest.raises(TargetError):
        convert(source, out)
    assert list(parent.iterdir()) == []


def test_a_relative_path_is_resolved_against_the_current_directory(
    source: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parent)
    convert(source, "out/")
    assert verify_integrity("out").passed
    assert names_beside(parent / "out") == {"out"}


@pytest.mark.parametrize("name", ["x" * 256, "x" * 250, "x" * 5000])
def test_a_name_too_long_for_the_file_system_is_rejected(name: str, source: Path, parent: Path) -> None:
    message = refusal(source, parent / name)
    assert "File name too long" in message


@pytest.mark.parametrize("name", ["ö 🦙", "with 'quotes'\" and $", "-rf", "a\nb", "x" * 247, "out.partial"])
def test_unusual_names_work_like_any_other(name: str, source: Path, parent: Path) -> None:
    convert(source, parent / name)
    assert verify_integrity(parent / name).passed
    assert names_beside(parent / name) == {name}


def test_zero_workers_are_a_usage_error(source: Path, parent: Path) -> None:
    with pytest.raises(UsageError):
        convert(source, parent / "out", workers=0)
    assert list(parent.iterdir()) == []


def test_files_and_folders_get_ordinary_modes(source: Path, parent: Path) -> None:
    before = os.umask(0o022)
    try:
        convert(source, parent / "out")
    finally:
        os.umask(before)
    assert (parent / "out").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (parent / "out").iterdir()} == {0o644}


def test_every_file_and_both_folders_are_synced_before_and_after_the_rename(source: Path, parent: Path) -> None:
    events: list[tuple[str, str]] = []

    class Watching(Disk):
        def raw_fsync(self, descriptor: int) -> None:
            events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
            super().raw_fsync(descriptor)

        def raw_rename(self, old: Path, new: Path) -> None:
            events.append(("rename", new.name))
            super().raw_rename(old, new)

    convert(source, parent / "out", disk=Watching())
    renamed = events.index(("rename", "out"))
    synced = {name for kind, name in events[:renamed] if kind == "sync"}
    assert {*contents(parent / "out"), "folder", "journal"} <= synced
    assert events[renamed - 1] == ("sync", "journal")
    assert ("sync", "parent") in events[renamed:]


def test_only_the_disk_object_changes_the_target(source: Path, parent: Path) -> None:
    """With a disk that does nothing, no file or directory appears: no other code writes."""

    class Nothing(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name == "raw_open":
                return os.open(os.devnull, os.O_RDWR)
            return len(arguments[1]) if name in {"raw_pwrite", "raw_write"} else None  # type: ignore[arg-type]

    with pytest.raises((TargetError, FileNotFoundError)):
        Staging.begin(parent / "out", "fingerprint", disk=Nothing())
    assert list(parent.iterdir()) == []


def test_force_on_a_file_system_that_is_busy_loses_nothing(source: Path, parent: Path) -> None:
    """The target may be a mount point, which cannot be renamed."""
    out = parent / "out"
    convert(source, out, ConversionOptions(block_size=128))
    old = contents(out)

    class Busy(FaultyDisk):
        def perform(self, name: str, arguments: tuple[object, ...]) -> object:
            if name in {"raw_exchange", "raw_rename"}:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            return super().perform(name, arguments)

    with pytest.raises(TargetError, match="busy"):
        convert(source, out, force=True, disk=Busy())
    assert contents(out) == old
    convert(source, out, force=True)
    assert contents(out) != old
    assert names_beside(out) == {"out"}


def test_an_interrupted_replacement_still_needs_force(source: Path, parent: Path) -> None:
    out = parent / "out"
    convert(source, out, ConversionOptions(block_size=128))
    old = contents(out)
    with pytest.raises(TargetError):
        convert(source, out, force=True, disk=FaultyDisk(20, "EIO"))
    assert (parent / "out.partial").is_dir()
    with pytest.raises(TargetError, match="force=True"):
        convert(source, out)
    assert contents(out) == old
    convert(source, out, force=True)
    assert names_beside(out) == {"out"}


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_appears_during_the_conversion_is_not_replaced(force: bool, source: Path, parent: Path) -> None:
    out = parent / "out"

    def appear(_: object) -> None:
        if not out.exists():
            place(out, {"thesis.txt": b"years of work"})

    with pytest.raises(TargetError, match="is not an artifact"):
        convert(source, out, workers=1, force=force, on_progress=appear)
    assert contents(out) == {"thesis.txt": b"years of work"}
