"""A training builds on nothing damaged: every digest is compared first, and no file may be written to meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.errors import ArtifactError, Reason, TargetError
from qformat.training import run as run_module
from qformat.training.result import TrainingResult
from tests.artifact.damaged import damaged_copy
from tests.small_models import Tensor, llama_config, llama_tensors, write_checkpoint
from tests.training import runs

DAMAGED = (
    ("model.norm.weight", "data"),
    ("model.embed_tokens.weight", "data"),
    ("model.layers.1.mlp.up_proj.weight", "absmax"),
    ("model.layers.0.self_attn.q_proj.weight", "packed"),
)


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded before the digests were compared")

    monkeypatch.setattr(run_module, "load_model", refuse)
    monkeypatch.setattr(run_module, "prepare_data", refuse)


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize(("tensor", "component"), DAMAGED)
def test_training_starts_on_no_flipped_bit(
    tensor: str, component: str, artifact: Path, examples: Path, tmp_path: Path
) -> None:
    damaged = damaged_copy(artifact, tmp_path / "damaged", tensor, component)
    with pytest.raises(ArtifactError) as refused:
        runs.run(damaged, examples, tmp_path / "out")
    assert (refused.value.reason, refused.value.tensor) == (Reason.COMPONENT_DIGEST, tensor)
    assert refused.value.field == component
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_model")
def test_the_output_does_not_lie_in_the_artifact(artifact: Path, examples: Path) -> None:
    """The next training would reject the artifact because of it."""
    with pytest.raises(TargetError, match=r"adapter: is inside the source\. Choose a directory next to it"):
        runs.run(artifact, examples, artifact / "adapter")
    assert not (artifact / "adapter").exists()


@pytest.mark.usefixtures("_no_model")
def test_a_training_does_not_resume_on_a_damaged_base(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    output = shutil.copytree(undisturbed.output, tmp_path / "out")
    damaged = damaged_copy(artifact, tmp_path / artifact.name, *DAMAGED[0])
    before = runs.adapter_bytes(output)
    with pytest.raises(ArtifactError, match="was changed: XXH3-128"):
        runs.run(damaged, examples, output, resume="latest")
    assert runs.adapter_bytes(output) == before


def test_nothing_is_saved_after_a_mapped_file_was_written_to(artifact: Path, examples: Path, tmp_path: Path) -> None:
    base = shutil.copytree(artifact, tmp_path / "base")
    (shard,) = base.glob("*.safetensors")

    def write(line: dict[str, object], _: int) -> None:
        if line["step"] == 3:
            with shard.open("r+b") as file:
                file.write(shard.read_bytes()[:1])
            os.utime(shard, ns=(0, 1))  # a coarse clock may not show that the file was written to

    with pytest.raises(ArtifactError, match="was written to since it was mapped"):
        runs.run(base, examples, tmp_path / "out", on_metrics=write)
    assert (tmp_path / "out" / "checkpoint-2").exists()
    assert not (tmp_path / "out" / "checkpoint-4").exists()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_weight_that_is_nan_is_named_instead_of_the_learning_rate(examples: Path, tmp_path: Path) -> None:
    sizes = {"hidden": 64, "intermediate": 128, "vocabulary": runs.VOCABULARY, "n_layers": 1}
    tensors = llama_tensors(**sizes)
    norm = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = Tensor(norm.dtype, norm.shape, norm.data[:4] + b"\xc0\x7f" + norm.data[6:])
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(**sizes))
    runs.small_tokenizer().save_pretrained(source)
    convert(source, tmp_path / "nf4")
    with pytest.raises(ArtifactError, match="contains NaN or Inf") as refused:
        runs.run(tmp_path / "nf4", examples, tmp_path / "out")
    assert (refused.value.reason, refused.value.tensor) == (Reason.NONFINITE_WEIGHT, "model.norm.weight")
    assert "learning rate" not in str(refused.value)
