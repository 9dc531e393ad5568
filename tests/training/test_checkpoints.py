"""Checkpoints appear atomically, and a digest covers every byte of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.errors import AdapterError, TargetError, UsageError
from qformat.training.checkpoints import SEAL_NAME, CheckpointFolder, read_checkpoint


def write(folder: CheckpointFolder, step: int) -> Path:
    with folder.writing(step, {"tokens": step}) as place:
        (place / "a.bin").write_bytes(bytes(range(100)))
        (place / "inner").mkdir()
        (place / "inner" / "b.bin").write_bytes(b"b" * step)
    return folder.folder(step)


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path, keep=2)


def test_old_checkpoints_are_removed_and_the_latest_is_found(folder: CheckpointFolder) -> None:
    for step in (2, 10, 4, 12):
        write(folder, step)
    assert folder.steps() == [10, 12]
    found = folder.find("latest")
    assert (found.step, found.facts) == (12, {"tokens": 12})
    assert folder.find("checkpoint-10").step == 10
    assert folder.find("some/where/checkpoint-10").step == 10
    with pytest.raises(UsageError, match="Existing checkpoints: checkpoint-10, checkpoint-12"):
        folder.find("checkpoint-4")


def test_an_unfinished_checkpoint_is_ignored(folder: CheckpointFolder) -> None:
    write(folder, 2)
    with pytest.raises(ZeroDivisionError), folder.writing(4, {}) as place:
        (place / "a.bin").write_bytes(bytes(1 // 0))
    assert folder.steps() == [2]
    assert not folder.partial.exists()


def test_the_next_checkpoint_removes_the_remains_of_a_crash(folder: CheckpointFolder) -> None:
    (folder.partial / "checkpoint-9").mkdir(parents=True)
    (folder.partial / "checkpoint-9" / "a.bin").touch()
    assert folder.steps() == []
    write(folder, 4)
    assert not folder.partial.exists()


@pytest.mark.parametrize("name", ["a.bin", "inner/b.bin", SEAL_NAME])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_any_damage_is_detected_and_the_file_is_reported(folder: CheckpointFolder, name: str, damage: str) -> None:
    write(folder, 2)
    path = write(folder, 4) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= damage == "flip"
        path.write_bytes(data[:-1] if damage == "cut" else data + b" " * (damage == "grow" and name != SEAL_NAME))
        if damage == "grow" and name == SEAL_NAME:
            path.write_bytes(data + b"}")
    with pytest.raises(AdapterError, match=rf"{path.name}: .*resume='checkpoint-2', which is intact"):
        folder.find("latest")
    assert folder.last_intact() == "checkpoint-2"


def test_every_flipped_bit_of_the_seal_is_detected(folder: CheckpointFolder) -> None:
    path = write(folder, 4) / SEAL_NAME
    data = path.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(folder.folder(4))
        except AdapterError:
            continue
        assert (found.step, found.facts) == (4, {"tokens": 4})  # the flip changed whitespace to other whitespace


@pytest.mark.parametrize(
    "change",
    [
        {"step": "4"},
        {"files": []},
        {"facts": None},
        {"files": {"a.bin": {"nbytes": "100", "xxh3": 3}}},
        {"files": {"a.bin": []}},
        {"files": {"../outside": {"nbytes": 0, "xxh3": ""}}},
        {"files": {"/etc/hostname": {"nbytes": 0, "xxh3": ""}}},
    ],
    ids=str,
)
def test_a_forged_seal_is_rejected(folder: CheckpointFolder, change: dict[str, strict_json.Json]) -> None:
    path = write(folder, 4) / SEAL_NAME
    seal = strict_json.loads(path.read_bytes(), path=path, max_nbytes=10**6, error=AssertionError)  # type: ignore[type-var]
    assert isinstance(seal, dict)
    del seal["seal_xxh3"]
    seal |= change
    seal["seal_xxh3"] = xxh3(strict_json.dumps(seal).encode())
    path.write_text(strict_json.dumps(seal))
    with pytest.raises(AdapterError, match=r"checkpoint\.json: is damaged"):
        read_checkpoint(folder.folder(4))


def test_two_trainings_cannot_write_to_one_directory(folder: CheckpointFolder, tmp_path: Path) -> None:
    other = CheckpointFolder(tmp_path, keep=2)
    with folder.lock(), pytest.raises(TargetError, match="another training is writing"), other.lock():
        pass
    with other.lock():
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
