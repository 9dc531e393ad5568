"""diff lists every kind of difference between two artifacts, and counts it if both are local."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.artifact.manifest import KeptRecord
from qformat.artifact.manifest_diff import Aspect, diff_manifests
from qformat.artifact.reading.reader import KeptTensor, PackedTensor
from qformat.artifact.reading.structure import read_manifest
from qformat.cli.main import run
from qformat.converters.convert import ConversionOptions, convert
from qformat.hub.card.licenses import License
from qformat.hub.card.prepared_card import CardOptions
from qformat.hub.diff import diff
from qformat.hub.publishing.publish import publish
from tests.hub.conftest import PATIENT
from tests.hub_stand_in import Hub
from tests.small_models import tiny_tensors, weight, write_checkpoint, write_tiny

DOWN = "model.layers.0.mlp.down_proj.weight"
"""9 x 7: an odd number of elements."""


def make(folder: Path, name: str, **options: object) -> Path:
    source = write_tiny(folder / f"{name}-source")
    convert(source, folder / name, ConversionOptions(**options))  # type: ignore[arg-type]
    return folder / name


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return make(tmp_path, "one")


def test_an_artifact_is_equal_to_itself_and_to_another_run(one: Path, tmp_path: Path) -> None:
    found = diff(one, make(tmp_path, "again"))
    assert found.equal
    assert found.manifests.same_source is True
    assert found.values == ()


def test_other_block_sizes_and_kept_tensors_are_differences_of_the_encoding(one: Path, tmp_path: Path) -> None:
    other = make(tmp_path, "other", block_size=128, skip=["model.layers.0.mlp.*"])
    found = diff(one, other).manifests
    assert found.same_model
    assert found.same_source
    aspects = {tensor.name: tensor.aspects for tensor in found.tensors}
    assert aspects[DOWN] == (Aspect.ENCODING,)
    assert aspects["model.layers.0.self_attn.o_proj.weight"] == (Aspect.ENCODING, Aspect.CODES, Aspect.SCALES)
    assert set(found.members) == {"recipe"}
    assert found.changed_files == ("config.json", "model.safetensors.index.json")


def test_another_source_is_listed_and_its_codes_and_scales_are_counted_as_numpy_counts_them(
    one: Path, tmp_path: Path
) -> None:
    tensors = tiny_tensors()
    changed = {**tensors, DOWN: weight((9, 7), "F16", seed=77), "model.norm.weight": weight((8,), seed=78)}
    source = write_checkpoint(
        tmp_path / "changed-source", changed, config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    )
    convert(source, tmp_path / "changed")
    found = diff(one, tmp_path / "changed")

    assert found.manifests.same_source is False
    other_sources = [tensor.name for tensor in found.manifests.tensors if Aspect.SOURCE in tensor.aspects]
    assert other_sources == [DOWN, "model.norm.weight"]
    assert found.values is not None
    counted = {value.name: value for value in found.values}
    with qformat.open(one) as a, qformat.open(tmp_path / "changed") as b:
        mine, other = a[DOWN], b[DOWN]
        assert isinstance(mine, PackedTensor)
        assert isinstance(other, PackedTensor)
        nibbles = [np.stack([one.packed >> 4, one.packed & 15], 1).reshape(-1)[:63] for one in (mine, other)]
        assert counted[DOWN].n_codes == int((nibbles[0] != nibbles[1]).sum()) > 0
        assert counted[DOWN].n_scales == int((mine.scales() != other.scales()).sum()) == 1
        kept, other_kept = a["model.norm.weight"], b["model.norm.weight"]
        assert isinstance(kept, KeptTensor)
        assert isinstance(other_kept, KeptTensor)
        expected = int((kept.data != other_kept.data).sum())
    assert counted["model.norm.weight"].n_values == expected > 0


def test_tensors_of_other_names_and_shapes_are_another_model(one: Path, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["lm_head.weight"] = weight((4, 8))
    tensors["model.layers.0.extra.bias"] = tensors.pop("model.layers.0.mlp.down_proj.bias")
    source = write_checkpoint(
        tmp_path / "changed-source", tensors, config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    )
    convert(source, tmp_path / "changed")
    found = diff(one, tmp_path / "changed").manifests
    assert not found.same_model
    assert found.only_in_a == ("model.layers.0.mlp.down_proj.bias",)
    assert found.only_in_b == ("model.layers.0.extra.bias",)
    assert Aspect.SHAPE in next(tensor.aspects for tensor in found.tensors if tensor.name == "lm_head.weight")


def test_other_shards_of_the_same_tensors_are_distinguished_from_other_tensors(one: Path, tmp_path: Path) -> None:
    found = diff(one, make(tmp_path, "many", max_shard_nbytes=2000)).manifests
    assert found.same_weights
    assert not found.same_shards
    assert not found.equal


def test_a_source_that_only_one_manifest_records_is_not_a_difference(one: Path) -> None:
    manifest = read_manifest(one)
    record = manifest.tensors[DOWN]
    unknown = {**manifest.tensors, DOWN: replace(record, source_xxh3=None)}  # type: ignore[call-arg]
    found = diff_manifests(manifest, replace(manifest, tensors=unknown))
    assert not found.tensors
    assert (found.n_tensors, found.n_sources, found.n_same_sources) == (5, 4, 4)


def test_a_kept_tensor_that_was_tuned_differs_in_its_data_and_not_in_its_source(one: Path) -> None:
    manifest = read_manifest(one)
    name, record = next((name, kept) for name, kept in manifest.tensors.items() if isinstance(kept, KeptRecord))
    tuned = replace(record, xxh3="0" * 32, source_xxh3=record.xxh3)
    found = diff_manifests(manifest, replace(manifest, tensors={**manifest.tensors, name: tuned}))
    assert {tensor.name: tensor.aspects for tensor in found.tensors} == {name: (Aspect.DATA,)}
    assert found.same_source


def test_a_published_artifact_has_the_weights_of_the_local_one_and_additionally_a_card(
    hub: Hub, one: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(one, "me/one", CardOptions(license=License("mit")), transfer=PATIENT)
    assert run(["diff", str(one), "me/one", "--weights"]) == 0
    assert "files only in B: README.md\nthe same weights" in capsys.readouterr().out
    assert run(["diff", "me/one", str(one)]) == 1
    assert not hub.requests(r"\.safetensors")
    assert run(["diff", "me/one", "me/one", "--revision-b", hub.repositories.by_name["me/one"].head.oid]) == 0
    assert run(["diff", "me/one", "me/missing"]) == 1


def test_the_command_line_lists_tensors_and_exits_with_1(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make(tmp_path, "other", double_quant=False)
    assert run(["diff", str(one), str(other), "--all"]) == 1
    shown = capsys.readouterr().out
    assert "the same model: 5 tensors with the same names and shapes, from the same source" in shown
    assert f"{DOWN} encoding, scales codes: 0 of 63 (0.00%), scales: 0 of 1 (0.00%) " in " ".join(shown.split())
    assert shown.endswith("different artifacts\n")
    assert run(["diff", str(one), str(other), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["same_model"]
    assert not facts["same"]
    assert facts["tensors"][0]["differs_in"] == ["encoding", "scales"]
    assert facts["members"]["recipe"]["b"]["defaults"]["double_quant"] is False


def test_directories_and_repositories_without_an_artifact_are_rejected(one: Path, tmp_path: Path) -> None:
    shutil.copytree(one, tmp_path / "broken")
    (tmp_path / "broken" / "qformat.json").write_text("{}")
    assert run(["diff", str(one), str(tmp_path / "broken")]) == 1
    assert run(["diff", str(one), str(tmp_path / "missing")]) == 1
