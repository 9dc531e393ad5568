"""`model.save_pretrained` of a loaded model writes a byte-identical artifact, or new digests for modified tensors."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import qformat
from qformat.artifact.manifest import KeptRecord
from qformat.artifact.reading.structure import read_manifest
from qformat.artifact.writing.record_evaluation import record_evaluation
from qformat.errors import ArtifactError, Reason, TargetError, UsageError
from qformat.model.load import load_model
from qformat.model.loaded_model import save
from qformat.model.transformers_quantizer import METHOD
from qformat.names import MANIFEST_NAME
from tests.artifact.damaged import damaged_copy
from tests.converters.faulty_disk import FaultyDisk
from tests.model.sides import with_lora
from tests.small_models import llama_config, llama_tensors, write_checkpoint

Load = Callable[[Path], Any]

IDS = torch.arange(20)[None]


def by_registration(path: Path) -> Any:
    before = AUTO_QUANTIZER_MAPPING[METHOD]
    qformat.register()
    try:
        return AutoModelForCausalLM.from_pretrained(path)
    finally:
        AUTO_QUANTIZER_MAPPING[METHOD] = before


def by_load_model(path: Path) -> Any:
    return load_model(path, device="cpu")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact with two shards and other files."""
    sizes = {"hidden": 128, "intermediate": 192, "vocabulary": 50}
    source = write_checkpoint(tmp_path / "source", llama_tensors(**sizes), config=llama_config(**sizes))
    (source / "LICENSE").write_text("free")
    (source / "merges.txt").write_text("free")
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 7}\n')
    qformat.convert(source, tmp_path / "artifact", qformat.ConversionOptions(max_shard_nbytes=100_000))
    return tmp_path / "artifact"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("load", [by_load_model, by_registration])
def test_an_unmodified_model_is_saved_byte_identically(artifact: Path, tmp_path: Path, load: Load) -> None:
    load(artifact).save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(artifact)
    assert qformat.verify(tmp_path / "saved", sha256=True).passed


def test_running_and_generating_changes_nothing_that_is_saved(artifact: Path, tmp_path: Path) -> None:
    model = by_load_model(artifact)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model.eval().generate(IDS, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(artifact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_activations_does_not_change_the_saved_files(
    artifact: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    load_model(artifact, device="cpu", dtype=dtype).save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(artifact)


@pytest.mark.parametrize("load", [by_load_model, by_registration])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight.absmax"])
def test_only_a_modified_tensor_gets_a_new_digest(artifact: Path, tmp_path: Path, load: Load, name: str) -> None:
    model = load(artifact)
    model.state_dict()[name][0] += 1
    model.save_pretrained(tmp_path / "saved")
    assert qformat.verify(tmp_path / "saved", sha256=True).passed
    old, new = contents(artifact), contents(tmp_path / "saved")
    differing = {file for file in old if old[file] != new[file]}
    assert len(differing) == 2
    assert MANIFEST_NAME in differing
    before, after = read_manifest(artifact).tensors, read_manifest(tmp_path / "saved").tensors
    assert {tensor for tensor in before if before[tensor] != after[tensor]} == {name.removesuffix(".absmax")}
    again = load_model(tmp_path / "saved", device="cpu")
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_modified_kept_tensor_records_its_source_and_the_evaluation_is_dropped(
    artifact: Path, tmp_path: Path
) -> None:
    record_evaluation(artifact, {"texts": []}, of=read_manifest(artifact))
    model = by_load_model(artifact)
    model.save_pretrained(tmp_path / "same")
    assert read_manifest(tmp_path / "same").evaluation == {"texts": []}
    model.state_dict()["model.norm.weight"][0] += 1
    model.save_pretrained(tmp_path / "changed")
    old, new = read_manifest(artifact), read_manifest(tmp_path / "changed")
    before, after = old.tensors["model.norm.weight"], new.tensors["model.norm.weight"]
    assert isinstance(before, KeptRecord)
    assert isinstance(after, KeptRecord)
    assert (before.source_xxh3, after.source_xxh3) == (None, before.xxh3)
    assert new.evaluation is None


def test_a_modified_config_changes_no_other_file(artifact: Path, tmp_path: Path) -> None:
    model = by_load_model(artifact)
    model.config.use_cache = False
    model.generation_config.max_new_tokens = 9
    model.save_pretrained(tmp_path / "saved")
    assert qformat.verify(tmp_path / "saved", sha256=True).passed
    old, new = contents(artifact), contents(tmp_path / "saved")
    assert {name for name in old if old[name] != new[name]} == {
        "config.json", "generation_config.json", MANIFEST_NAME,
    }  # fmt: skip
    again = by_load_model(tmp_path / "saved")
    assert again.config.use_cache is False
    assert (again.generation_config.max_new_tokens, again.generation_config.eos_token_id) == (9, 2)


def test_a_value_that_the_files_dtype_would_round_is_rejected(artifact: Path, tmp_path: Path) -> None:
    model = load_model(artifact, device="cpu", dtype=torch.float32)
    model.model.norm.weight.data[0] = 1 + 2.0**-20
    with pytest.raises(
        UsageError, match=r"norm\.weight': saving would round it from torch\.float32 to torch\.bfloat16"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_damaged_byte_does_not_get_a_matching_digest(artifact: Path, tmp_path: Path) -> None:
    shard = min(artifact.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    model = by_load_model(artifact)  # the structure is intact
    with pytest.raises(ArtifactError) as refusal:
        model.save_pretrained(tmp_path / "saved")
    assert refusal.value.reason is Reason.COMPONENT_DIGEST
    assert not (tmp_path / "saved").exists()


def test_a_damaged_tensor_does_not_get_a_matching_digest_when_it_is_changed_in_memory(
    artifact: Path, tmp_path: Path
) -> None:
    model = by_load_model(damaged_copy(artifact, tmp_path / "damaged", "model.norm.weight", "data"))
    model.model.norm.weight.data.mul_(2)  # as a training of the norms would
    with pytest.raises(ArtifactError) as refusal:
        model.save_pretrained(tmp_path / "saved")
    assert (refusal.value.reason, refusal.value.tensor) == (Reason.COMPONENT_DIGEST, "model.norm.weight")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["merges.txt", "config.json", MANIFEST_NAME])
def test_a_file_that_was_changed_or_removed_is_rejected(artifact: Path, tmp_path: Path, name: str) -> None:
    model = by_load_model(artifact)
    text = (artifact / name).read_bytes()
    (artifact / name).write_bytes(text.replace(b"free", b"gone").replace(b'"reason"', b'"reasom"') + b" ")
    with pytest.raises(ArtifactError):
        model.save_pretrained(tmp_path / "saved")
    (artifact / name).unlink()
    with pytest.raises(ArtifactError):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_transformers_own_layout_is_not_written_over_an_artifact(artifact: Path, tmp_path: Path) -> None:
    model = by_load_model(artifact)
    before = contents(artifact)
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="is not a directory"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(TargetError, match="mapped from files in this directory"):
        model.save_pretrained(artifact, state_dict=model.state_dict())
    shutil.copytree(artifact, tmp_path / "other")
    with pytest.raises(TargetError, match="manifest would no longer match its files"):
        model.save_pretrained(tmp_path / "other", max_shard_size="1GB")
    assert contents(artifact) == before == contents(tmp_path / "other")


def test_only_the_main_process_writes(artifact: Path, tmp_path: Path) -> None:
    model = by_load_model(artifact)
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "deep" / "er", is_main_process=True)
    assert contents(tmp_path / "deep" / "er") == contents(artifact)


def test_transformers_saves_other_tensors_without_a_manifest(
    artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = by_load_model(artifact)
    model.resize_token_embeddings(64)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "saved")
    expected = "without a manifest, because the model has the tensor 'model.embed_tokens.weight' in another shape"
    assert expected in caplog.text
    assert not (tmp_path / "saved" / MANIFEST_NAME).exists()
    assert torch.equal(by_load_model(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_transformers_saves_if_an_argument_asks_for_its_layout(artifact: Path, tmp_path: Path) -> None:
    model = by_load_model(artifact)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > len(list(artifact.glob("*.safetensors")))
    before, after = model.state_dict(), by_load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


def test_an_adapter_is_saved_without_the_model(artifact: Path, tmp_path: Path) -> None:
    wrapped = with_lora(by_load_model(artifact))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert not list((tmp_path / "adapter").glob("model*"))


def test_a_directory_without_a_manifest_is_saved_without_one(artifact: Path, tmp_path: Path) -> None:
    (artifact / MANIFEST_NAME).unlink()
    by_load_model(artifact).save_pretrained(tmp_path / "saved")
    left_out = {"LICENSE", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
    assert contents(tmp_path / "saved") == {
        name: data for name, data in contents(artifact).items() if name not in left_out
    }


def test_copies_can_be_saved_and_keep_their_class(artifact: Path, tmp_path: Path) -> None:
    model = by_load_model(artifact)
    own = type(model).__mro__[2]
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert isinstance(other, own)
        assert type(other).__name__ == own.__name__
        other.save_pretrained(tmp_path / str(number))
        assert contents(tmp_path / str(number)) == contents(artifact)


def test_a_full_disk_leaves_no_output_directory(artifact: Path, tmp_path: Path) -> None:
    model = by_load_model(artifact)
    with pytest.raises(TargetError):
        save(model, tmp_path / "saved", disk=FaultyDisk(20, "full from here on"))
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(artifact)
    assert not (tmp_path / "saved.partial").exists()


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(path, ns=(0, 1))  # the file system's clock may be too coarse to record the change


@pytest.mark.parametrize(
    ("change", "reason"),
    [(overwrite, Reason.FILE_DIGEST), (lambda path: os.truncate(path, path.stat().st_size - 1), Reason.FILE_SIZE)],
)
@pytest.mark.parametrize("load", [by_load_model, by_registration])
def test_a_change_of_a_mapped_file_is_detected_before_use(
    artifact: Path, tmp_path: Path, change: Callable[[Path], None], reason: Reason, load: Load
) -> None:
    model = load(artifact)
    change(max(artifact.glob("*.safetensors")))
    for use in (lambda: model.generate(IDS, max_new_tokens=2), lambda: model.save_pretrained(tmp_path / "saved")):
        with pytest.raises(ArtifactError, match="replace files by renaming") as refusal:
            use()
        assert refusal.value.reason is reason


def test_replaced_or_removed_files_do_not_affect_a_loaded_model(artifact: Path) -> None:
    model = by_load_model(artifact)
    expected = model.generate(IDS, max_new_tokens=2, do_sample=False)
    for shard in artifact.glob("*.safetensors"):
        other = shard.with_suffix(".new")
        other.write_bytes(b"another")
        other.rename(shard)
    assert torch.equal(model.generate(IDS, max_new_tokens=2, do_sample=False), expected)
    shutil.rmtree(artifact)
    assert torch.equal(model.generate(IDS, max_new_tokens=2, do_sample=False), expected)


def test_a_change_of_a_file_during_loading_is_detected(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qformat.model import load

    attach = load.attach

    def slowly(*arguments: Any) -> Any:
        os.truncate(max(artifact.glob("*.safetensors")), 5)
        return attach(*arguments)

    monkeypatch.setattr(load, "attach", slowly)
    with pytest.raises(ArtifactError) as refusal:
        by_load_model(artifact)
    assert refusal.value.reason is Reason.FILE_SIZE
