"""Copies of an artifact with some new bytes: the rest is checked and copied, and faults leave no partial copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformat.artifact.components import Component
from qformat.artifact.manifest import KeptRecord, PackedRecord
from qformat.artifact.packed_arrays import store_scales
from qformat.artifact.reading.reader import PackedTensor, open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.artifact.writing import rewrite as rewrites
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.rewrite import Replacements, replaced_by
from qformat.artifact.writing.staging import Staging
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import ArtifactError, Reason, UsageError
from tests.small_models import contents, write_tiny

WEIGHT = "model.layers.0.self_attn.o_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewritten")
    options = ConversionOptions(max_shard_nbytes=2000)
    source = write_tiny(folder / "source", side_files=("LICENSE", "tokenizer.json"))
    convert(source, folder / "nf4", options)
    assert len(list((folder / "nf4").glob("*.safetensors"))) > 1
    return folder / "nf4"


def other_bytes(artifact: Path) -> dict[str, dict[Component, np.ndarray[Any, Any]]]:
    """Return doubled scales of one weight and a changed norm."""
    with open_artifact(artifact) as opened:
        tensor = opened[WEIGHT]
        assert isinstance(tensor, PackedTensor)
        parts = store_scales(tensor.scales() * 2, tensor.layout).with_codes(tensor.packed).components()
    del parts[Component.PACKED]
    return {WEIGHT: parts, NORM: {Component.PACKED: np.full(8, 0x3F80, np.uint16)}}


def rewrite(artifact: Path, out: Path, replacements: Replacements, disk: Disk | None = None) -> None:
    with open_artifact(artifact) as opened, Staging.begin(out, "f", disk=disk or Disk()) as staging:
        if not staging.sealed_before:
            rewrites.rewrite(
                opened.structure,
                staging,
                replaced_by(opened.structure, replacements),
                recipe={**opened.manifest.recipe, "tuning": {}},
            )


def test_only_replaced_components_change(artifact: Path, tmp_path: Path) -> None:
    rewrite(artifact, tmp_path / "out", other_bytes(artifact))
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    before, after = contents(artifact), contents(tmp_path / "out")
    assert {name: len(data) for name, data in before.items() if name != "qformat.json"} == {
        name: len(data) for name, data in after.items() if name != "qformat.json"
    }
    with open_artifact(artifact) as old, open_artifact(tmp_path / "out") as new:
        assert new.manifest.recipe == {**old.manifest.recipe, "tuning": {}}
        for name, tensor in old.items():
            if name == WEIGHT:
                assert isinstance(tensor, PackedTensor)
                changed = new[name]
                assert isinstance(changed, PackedTensor)
                np.testing.assert_allclose(changed.scales(), 2 * tensor.scales(), rtol=0.05)
                np.testing.assert_array_equal(changed.packed, tensor.packed)
            elif name != NORM:
                assert new.manifest.tensors[name] == old.manifest.tensors[name]
        kept, source = new.manifest.tensors[NORM], old.manifest.tensors[NORM]
        assert isinstance(kept, KeptRecord)
        assert isinstance(source, KeptRecord)
        assert (kept.source_xxh3, source.source_xxh3) == (source.xxh3, None)


def test_the_same_bytes_give_the_same_artifact_except_for_the_recipe(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        norm = opened.view(NORM).copy()
        with Staging.begin(tmp_path / "out", "f", disk=Disk()) as staging:
            rewrites.rewrite(
                opened.structure,
                staging,
                replaced_by(opened.structure, {NORM: {Component.PACKED: norm}}),
                recipe=opened.manifest.recipe,
            )
    assert contents(tmp_path / "out") == contents(artifact)


def test_a_damaged_component_is_reported_and_nothing_is_written(artifact: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, data in contents(artifact).items():
        (bad / name).write_bytes(data)
    with open_artifact(bad) as opened:
        name = next(name for name, record in opened.manifest.tensors.items() if isinstance(record, PackedRecord))
        where = opened.located[name]
    data = bytearray((bad / where.shard).read_bytes())
    data[where.entry.start] ^= 1
    (bad / where.shard).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"tensor '{name}': was changed") as refused:
        rewrite(bad, tmp_path / "out", {})
    assert refused.value.reason is Reason.COMPONENT_DIGEST
    assert not (tmp_path / "out").exists()


def edited(artifact: Path, folder: Path, name: str) -> Path:
    """Return a copy of the artifact in which the first byte of a file differs."""
    folder.mkdir()
    for file, data in contents(artifact).items():
        (folder / file).write_bytes(b"X" + data[1:] if file == name else data)
    return folder


def test_a_changed_side_file_of_the_model_is_reported(artifact: Path, tmp_path: Path) -> None:
    bad = edited(artifact, tmp_path / "bad", "tokenizer.json")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: was changed") as refused:
        rewrite(bad, tmp_path / "out", {})
    assert refused.value.reason is Reason.FILE_DIGEST


def test_a_changed_file_that_accompanies_the_model_is_copied_and_listed_again(artifact: Path, tmp_path: Path) -> None:
    rewrite(edited(artifact, tmp_path / "edited", "LICENSE"), tmp_path / "out", {})
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (tmp_path / "edited" / "LICENSE").read_bytes()
    report = verify_integrity(tmp_path / "out", sha256=True)
    assert (report.findings, report.notices) == ((), ())


def test_a_removed_file_that_accompanies_the_model_is_not_listed_any_more(artifact: Path, tmp_path: Path) -> None:
    (edited(artifact, tmp_path / "edited", "") / "LICENSE").unlink()
    rewrite(tmp_path / "edited", tmp_path / "out", {})
    report = verify_integrity(tmp_path / "out", sha256=True)
    assert (report.findings, report.notices) == ((), ())
    assert report.manifest is not None
    assert "LICENSE" not in report.manifest.files


@pytest.mark.parametrize(
    ("name", "part", "nbytes", "message"),
    [
        (NORM, Component.PACKED, 8, "has 8 bytes, but the artifact has 16 contiguous bytes"),
        (NORM, Component.ABSMAX, 8, "no such component"),
        ("x", Component.PACKED, 1, "no such component"),
    ],
)
def test_arrays_of_the_wrong_size_are_rejected(
    artifact: Path, tmp_path: Path, name: str, part: Component, nbytes: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        rewrite(artifact, tmp_path / "out", {name: {part: np.zeros(nbytes, np.uint8)}})
