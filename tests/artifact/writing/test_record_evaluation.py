"""An evaluation is written to a manifest atomically and changes nothing else in it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

import qformat
from qformat.artifact.writing.record_evaluation import record_evaluation
from qformat.converters.convert import convert
from qformat.errors import TargetError
from tests.artifact.damaged import reseal
from tests.converters.faulty_disk import FaultyDisk
from tests.small_models import contents, write_tiny

EVALUATION: dict[str, object] = {"window_length": 8, "texts": [{"name": "a.txt", "kl": {"mean": 0.25}}]}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    convert(write_tiny(tmp_path / "source"), tmp_path / "artifact")
    return tmp_path / "artifact"


def record(path: Path, evaluation: dict[str, object] = EVALUATION, disk: FaultyDisk | None = None) -> None:
    with qformat.open(path) as opened:
        record_evaluation(path, evaluation, of=opened.manifest, disk=disk)  # type: ignore[arg-type]


def test_a_recorded_evaluation_can_be_read_and_the_artifact_is_intact(artifact: Path) -> None:
    before = contents(artifact)
    record(artifact)
    assert qformat.verify(artifact, sha256=True).passed
    with qformat.open(artifact) as opened:
        assert opened.manifest.evaluation == EVALUATION
    after = contents(artifact)
    assert {name for name in after if after[name] != before.get(name)} == {"qformat.json"}
    lines = after["qformat.json"].decode().splitlines()
    kept = [line for line in lines if not line.startswith(('  "evaluation"', '  "manifest_sha256"'))]
    assert kept == [line for line in before["qformat.json"].decode().splitlines() if "manifest_sha256" not in line]
    assert lines[lines.index('  "tensors": {') - 1].startswith('  "evaluation": ')


def test_the_manifest_object_and_the_recording_write_the_same_bytes(artifact: Path) -> None:
    record(artifact)
    with qformat.open(artifact) as opened:
        assert opened.manifest.to_bytes() == (artifact / "qformat.json").read_bytes()


def test_recording_twice_replaces_and_gives_the_same_bytes(artifact: Path) -> None:
    record(artifact)
    once = contents(artifact)
    record(artifact, {"texts": []})
    assert contents(artifact) != once
    record(artifact)
    assert contents(artifact) == once


def test_members_of_later_versions_are_kept(artifact: Path) -> None:
    path = artifact / "qformat.json"
    manifest = json.loads(path.read_bytes())
    name = next(iter(manifest["tensors"]))
    later = {"format_version": "1.3", "history": [1, {"a": 1e300}], **manifest}
    later["format_version"] = "1.3"
    later["tensors"][name]["note"] = "x"
    later["files"]["LICENSE"]["note"] = 7
    later["manifest_sha256"] = later.pop("manifest_sha256")
    path.write_text(json.dumps(later))
    reseal(artifact)
    record(artifact)
    found = json.loads(path.read_bytes())
    assert found.pop("evaluation") == EVALUATION
    assert {key: value for key, value in found.items() if key != "manifest_sha256"} == {
        key: value for key, value in later.items() if key != "manifest_sha256"
    }
    assert qformat.verify(artifact).passed


def test_an_artifact_with_other_weights_is_rejected(artifact: Path, tmp_path: Path) -> None:
    with qformat.open(artifact) as opened:
        measured = opened.manifest
    options = qformat.ConversionOptions(block_size=32)
    convert(tmp_path / "source", artifact, options, force=True)
    before = contents(artifact)
    with pytest.raises(TargetError, match="the weights are not the ones that were evaluated"):
        record_evaluation(artifact, {}, of=measured)
    assert contents(artifact) == before


def test_a_manifest_in_the_cache_of_the_hub_is_not_changed(artifact: Path) -> None:
    blob = artifact.parent / "blob"
    (artifact / "qformat.json").rename(blob)
    (artifact / "qformat.json").symlink_to(blob)
    with pytest.raises(TargetError, match="Hub's cache"):
        record_evaluation(artifact, {}, of=None)  # type: ignore[arg-type]


def test_a_concurrent_recording_is_rejected(artifact: Path) -> None:
    folder = os.open(artifact, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with pytest.raises(TargetError, match="another process"):
            record(artifact)
    finally:
        os.close(folder)
