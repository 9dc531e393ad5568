"""Partial output damaged in every way: the same bytes in the end, or an error."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import TargetError
from tests.converters.encode.resumption import resume
from tests.converters.faulty_disk import N_TENSORS, OPTIONS, FaultyDisk, interrupt, place
from tests.small_models import contents, names_beside


@pytest.mark.parametrize("n_done", range(N_TENSORS))
def test_a_resumed_run_encodes_only_what_the_journal_lacks(
    n_done: int, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(source, out, n_done=n_done)
    summary, n_encoded = resume(source, out)
    assert n_encoded == N_TENSORS - n_done
    assert not summary.already_complete
    assert contents(out) == whole
    assert names_beside(out) == {"out"}


def test_a_resumed_run_reports_all_of_the_source_as_progress(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out, n_done=3)
    done: list[int] = []
    summary = convert(source, out, OPTIONS, disk=FaultyDisk(), on_progress=done.append)
    assert sum(done) == summary.plan.source_nbytes


def cut_last_line(journal: bytes) -> bytes:
    return journal[:-20]


def garbage_at_the_end(journal: bytes) -> bytes:
    return journal + b"\x00\xff{not json\n" * 3


def garbage_in_the_middle(journal: bytes) -> bytes:
    lines = journal.splitlines(keepends=True)
    return b"".join([*lines[:3], b"\x93\x00garbage\n", *lines[3:]])


def zeros_at_the_end(journal: bytes) -> bytes:
    return journal[:-300] + bytes(300)


def all_garbage(journal: bytes) -> bytes:
    return random.Random(0).randbytes(len(journal))


def wrong_json_kinds(journal: bytes) -> bytes:
    return journal + b'[]\n"text"\n17\nnull\n{"tensor": 5}\n{"tensor": {"a": []}, "components": 7}\n'


def empty(journal: bytes) -> bytes:
    return b""


def no_line_end(journal: bytes) -> bytes:
    return journal.replace(b"\n", b" ")


def huge_line(journal: bytes) -> bytes:
    return journal + b'{"tensor": "' + b"x" * 2**21 + b'"}\n'


def deep_line(journal: bytes) -> bytes:
    return journal + b"[" * 100_000 + b"\n"


@pytest.mark.parametrize(
    "damage",
    [
        cut_last_line,
        garbage_at_the_end,
        garbage_in_the_middle,
        zeros_at_the_end,
        all_garbage,
        wrong_json_kinds,
        empty,
        no_line_end,
        huge_line,
        deep_line,
    ],
)
def test_a_damaged_journal_only_costs_time(
    damage: Callable[[bytes], bytes], source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    journal = interrupt(source, out, n_done=4) / "journal"
    journal.write_bytes(damage(journal.read_bytes()))
    resume(source, out)
    assert contents(out) == whole
    assert names_beside(out) == {"out"}


def test_no_flipped_bit_of_the_journal_reaches_the_artifact(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The journal is trusted for the source's digests, which are expensive to check, so it has a digest of its own."""
    work = interrupt(source, tmp_path / "out", n_done=4)
    intact = {name: (work / "folder" / name).read_bytes() for name in os.listdir(work / "folder")}
    journal = (work / "journal").read_bytes()
    for position in range(0, 8 * len(journal), 101):
        out = tmp_path / str(position) / "out"
        staged = out.with_name("out.partial")
        place(staged / "folder", intact)
        damaged = bytearray(journal)
        damaged[position // 8] ^= 1 << position % 8
        (staged / "journal").write_bytes(damaged)
        (staged / "lock").touch()
        convert(source, out, OPTIONS, workers=1, disk=FaultyDisk())
        assert contents(out) == whole, f"bit {position}"
        assert names_beside(out) == {"out"}


def test_a_journal_that_is_a_folder_is_reported(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = interrupt(source, out, n_done=1)
    (work / "journal").unlink()
    (work / "journal").mkdir()
    with pytest.raises(TargetError, match="journal"):
        resume(source, out)


def delete_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def flip_a_bit_of_each_shard(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[4100] ^= 4
        path.write_bytes(data)


def cut_every_shard(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:4200])


def append_to_every_shard(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes() + b"more")


def zero_every_shard(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))


def delete_the_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    "damage",
    [
        delete_a_shard,
        flip_a_bit_of_each_shard,
        cut_every_shard,
        append_to_every_shard,
        zero_every_shard,
        delete_the_folder,
    ],
)
def test_staged_bytes_that_do_not_match_the_journal_are_written_again(
    damage: Callable[[Path], None], source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = interrupt(source, out, n_done=N_TENSORS - 1)
    damage(work / "folder")
    resume(source, out)
    assert contents(out) == whole


def test_the_partial_output_of_another_plan_is_rejected_and_discarded_with_restart(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(source, out, n_done=2, options=ConversionOptions(block_size=128))
    with pytest.raises(TargetError, match=r"a different source, recipe or options.*restart=True"):
        resume(source, out)
    assert not out.exists()
    _, n_encoded = resume(source, out, restart=True)
    assert n_encoded == N_TENSORS
    assert contents(out) == whole


def test_a_directory_of_that_name_that_is_not_ours_is_left_alone(source: Path, tmp_path: Path) -> None:
    work = place(tmp_path / "out.partial", {"thesis.txt": b"years of work"})
    for restart in (False, True):
        with pytest.raises(TargetError, match="was not created by qformat"):
            convert(source, tmp_path / "out", OPTIONS, restart=restart)
    assert contents(work) == {"thesis.txt": b"years of work"}


def test_a_file_with_the_work_folders_name_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_bytes(b"mine")
    for restart in (False, True):
        with pytest.raises(TargetError, match="was not created by qformat"):
            convert(source, tmp_path / "out", OPTIONS, restart=restart)
    assert (tmp_path / "out.partial").read_bytes() == b"mine"
