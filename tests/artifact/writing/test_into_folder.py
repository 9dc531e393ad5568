"""Writing into a directory with other contents: they stay, and no reader ever finds a half-written model."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.artifact.components import Component
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.into_folder import FolderStaging
from qformat.artifact.writing.rewrite import replaced_by, rewrite
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import ArtifactError, TargetError
from tests.converters.faulty_disk import FaultyDisk, Killed, PowerCut
from tests.small_models import contents, write_tiny

NORM = "model.norm.weight"
MANIFEST = "qformat.json"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = write_tiny(folder / "source", side_files=("LICENSE", "tokenizer.json", "generation_config.json"))
    convert(source, folder / "nf4", ConversionOptions(max_shard_nbytes=2000))
    return folder / "nf4"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory as a trainer leaves it before it saves the model."""
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "out" / "training_args.bin").write_bytes(b"arguments")
    return tmp_path / "out"


def save(artifact: Path, out: Path, *, norm: float | None = None, disk: Disk | None = None) -> FolderStaging:
    """Write the artifact to a directory, optionally with another norm."""
    with qformat.open(artifact) as opened, FolderStaging(out, disk or Disk()) as staging:
        replaced = {}
        if norm is not None:
            values = np.full(opened[NORM].shape, np.float32(norm).view(np.uint32) >> 16, np.uint16)
            replaced = {NORM: {Component.PACKED: values}}
        rewrite(opened.structure, staging, replaced_by(opened.structure, replaced))
        return staging


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_files_of_the_model_are_the_same_and_others_stay(artifact: Path, out: Path) -> None:
    save(artifact, out)
    assert files(out) == {**contents(artifact), "training_args.bin": b"arguments"}
    assert (out / "checkpoint-1" / "optimizer.pt").read_bytes() == b"state"
    report = qformat.verify(out, sha256=True)
    assert report.passed
    assert {notice.file for notice in report.notices} == {"checkpoint-1", "training_args.bin"}
    assert {path.name for path in out.iterdir()} == {*contents(artifact), "training_args.bin", "checkpoint-1"}


def test_an_older_model_is_replaced_with_its_shards_and_its_signature(
    artifact: Path, out: Path, tmp_path: Path
) -> None:
    older = ConversionOptions(max_shard_nbytes=10**9, block_size=32)
    convert(artifact.with_name("source"), tmp_path / "older", older)
    shutil.copytree(tmp_path / "older", out, dirs_exist_ok=True)
    for name in ("model.sig", "model.safetensors", "model-00007-of-00009.safetensors"):
        (out / name).write_bytes(b"old")
    save(artifact, out)
    assert files(out) == {**contents(artifact), "training_args.bin": b"arguments"}


def test_a_tokenizer_that_was_saved_first_stays_and_is_listed(artifact: Path, out: Path) -> None:
    kept = {"tokenizer.json": b'{"mine": 1}', "chat_template.jinja": b"{{ x }}", "README.md": b"# Mine\n"}
    replaced = {"generation_config.json": b"{}", "config.json": b"{}", "train.log": b"a line"}
    for name, data in (kept | replaced).items():
        (out / name).write_bytes(data)
    staging = save(artifact, out)
    assert {change.name for change in staging.kept} == set(kept)
    expected = {**contents(artifact), **kept, "training_args.bin": b"arguments", "train.log": b"a line"}
    del expected[MANIFEST]
    assert {name: data for name, data in files(out).items() if name != MANIFEST} == expected
    (out / "train.log").unlink()
    report = qformat.verify(out, sha256=True)
    assert report.passed
    assert report.manifest is not None
    assert report.manifest.sealed is not None
    assert [entry["file"] for entry in report.manifest.sealed] == sorted(kept)
    once = files(out)
    save(artifact, out)
    assert files(out) == once


@pytest.mark.parametrize("before", ["nothing", "older artifact", "other checkpoint"])
@pytest.mark.parametrize(
    "fault",
    [
        "kill",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("ENOSPC", "EIO", "nothing written from here on")),
    ],
)
def test_after_a_fault_at_any_call_there_is_the_old_model_none_or_the_new_one(
    artifact: Path, out: Path, fault: str, before: str
) -> None:
    if before == "older artifact":
        save(artifact, out, norm=2.0)
    elif before == "other checkpoint":
        shutil.copytree(artifact.with_name("source"), out, dirs_exist_ok=True)
    old = files(out)
    counted = FaultyDisk()
    save(artifact, out, disk=counted)
    new = files(out)
    n_calls = counted.n_calls
    assert n_calls > 30
    states = set()
    for call in range(n_calls):
        put_back(out, old)
        try:
            save(artifact, out, disk=FaultyDisk(call, fault))
        except (TargetError, Killed):
            states.add(state(out, old, new))
        else:  # the fault was an operation that this fault does not concern
            assert files(out) == new
    # Nothing of an old model is removed before everything is written.
    expected = {"old"} if fault == "nothing written from here on" else {"old", "none"}
    assert states >= ({"none"} if before == "nothing" else expected)
    save(artifact, out)
    assert files(out) == new
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_after_a_power_cut_there_is_the_old_model_none_or_the_new_one(artifact: Path, out: Path, seed: int) -> None:
    save(artifact, out, norm=2.0)
    old = files(out)
    counted = FaultyDisk()
    save(artifact, out, disk=counted)
    new = files(out)
    for call in range(0, counted.n_calls, 3):
        put_back(out, old)
        with pytest.raises(Killed):
            save(artifact, out, disk=PowerCut(call, seed))
        state(out, old, new)
    save(artifact, out)
    assert files(out) == new


def put_back(out: Path, old: dict[str, bytes]) -> None:
    for name in files(out).keys() - old.keys():
        (out / name).unlink()
    for name, data in old.items():
        (out / name).write_bytes(data)


def state(out: Path, old: dict[str, bytes], new: dict[str, bytes]) -> str:
    """Return which model a reader finds. It must be a complete one or none."""
    now = files(out)
    if MANIFEST in now and "config.json" in now:
        assert now in (old, new)
        assert qformat.verify(out, sha256=True).passed
        return "old" if now == old else "new"
    if "config.json" in now:  # a reader of bitsandbytes checkpoints finds the new model, or what was there before
        assert now == old or {name: data for name, data in new.items() if name != MANIFEST} == now
        return "old" if now == old else "new without a manifest"
    with pytest.raises(ArtifactError):
        qformat.open(out)
    return "none"


def test_a_target_that_cannot_be_replaced_is_rejected_and_unmodified(artifact: Path, out: Path, tmp_path: Path) -> None:
    (out / "config.json").mkdir()
    with pytest.raises(TargetError, match=r"config\.json: is a directory"):
        save(artifact, out)
    (out / "config.json").rmdir()
    assert {path.name for path in out.iterdir()} == {"checkpoint-1", "training_args.bin"}
    (out / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(TargetError, match=r"config\.json: is a link"):
        save(artifact, out)
    (out / "config.json").unlink()
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(TargetError, match="another process is writing to it"):
        save(artifact, out)
    os.close(folder)
    save(artifact, out)


def test_damage_of_the_model_is_reported_and_the_directory_is_unmodified(
    artifact: Path, out: Path, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(artifact, tmp_path / "bad"))
    shard = min(bad.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="was changed"):
        save(bad, out)
    assert {path.name for path in out.iterdir()} == {"checkpoint-1", "training_args.bin"}
