"""Complete trainings: their output, and the settings that determine the bytes of the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from qformat.artifact.manifest import Manifest
from qformat.artifact.reading.manifest_parser import parse
from qformat.errors import TargetError
from qformat.model.load import load_model, load_tokenizer
from qformat.training.data.prepare import DataSettings, prepare_data
from qformat.training.data.tokenised_data import IGNORED
from qformat.training.result import TrainingResult
from tests.model.sides import load_exact, load_ours
from tests.quality import models
from tests.training import runs


def test_a_training_leaves_an_adapter_a_card_checkpoints_and_metrics(undisturbed: TrainingResult) -> None:
    output = undisturbed.output
    assert undisturbed.steps == 6
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "metrics.jsonl",
        "qformat_base.json",
    ]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] > 0
        assert line["tokens_per_s"] > 0
        assert line["paging"]["pages"] == 1
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert json.loads((output / "qformat_base.json").read_text())["digest"] in card
    assert "| alpha | 8 |\n" in card
    assert "| target_modules | all-linear |\n| rslora | no |\n" in card
    assert "None" not in card


def test_the_loss_falls(artifact: Path, examples: Path, held_out: Path, tmp_path: Path) -> None:
    # With random weights the adapters alone have little effect, so train the output layer, too.
    strong: dict[str, Any] = {"max_steps": 20, "learning_rate": 0.1, "modules_to_save": ("lm_head",)}
    result = runs.run(artifact, examples, tmp_path / "out", eval_data=held_out, **strong)
    assert result.loss_before is not None
    assert result.loss_after is not None
    assert result.loss_after < result.loss_before


def test_the_adapter_loads_in_plain_peft(artifact: Path, undisturbed: TrainingResult) -> None:
    model = PeftModel.from_pretrained(load_model(artifact, device="cpu"), str(undisturbed.output))
    tokens = torch.tensor([load_tokenizer(artifact)("the block holds").input_ids])
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            plain = model(tokens).logits
    assert not torch.equal(adapted, plain)


def test_the_same_settings_give_the_same_bytes(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    again = runs.run(artifact, examples, tmp_path / "out")
    assert runs.adapter_bytes(again.output) == runs.adapter_bytes(undisturbed.output)


@pytest.mark.parametrize(
    "changed",
    [
        {"page_budget": "20KiB"},
        {"log_every": 3},
        pytest.param({"optim": "adamw"}, marks=pytest.mark.slow),
        pytest.param({"page_budget": "0"}, marks=pytest.mark.slow),
        pytest.param({"save_every": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equivalent_settings_give_the_same_bytes(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult, changed: dict[str, Any]
) -> None:
    result = runs.run(artifact, examples, tmp_path / "out", **changed)
    assert runs.adapter_bytes(result.output) == runs.adapter_bytes(undisturbed.output)


def test_gradient_checkpointing_gives_the_same_bytes(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    result = runs.run(artifact, examples, tmp_path / "out", gradient_checkpointing=True)
    assert runs.adapter_bytes(result.output) == runs.adapter_bytes(undisturbed.output)


def test_an_evaluation_between_steps_changes_nothing(
    artifact: Path, examples: Path, held_out: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    result = runs.run(artifact, examples, tmp_path / "out", eval_data=held_out, eval_every=1)
    assert sum("eval_loss" in line for line in result.metrics) == 7
    assert runs.adapter_bytes(result.output) == runs.adapter_bytes(undisturbed.output)


@pytest.mark.parametrize(
    ("batch_size", "packing"), [pytest.param(1, False, marks=pytest.mark.slow), (2, False), (3, True)]
)
def test_an_evaluation_gives_every_token_the_same_weight(
    examples: Path, held_out: Path, tmp_path: Path, batch_size: int, packing: bool
) -> None:
    # The logits of this model differ enough to give each token a different loss.
    artifact = models.write_artifact(models.write_source(tmp_path / "source"), tmp_path / "nf4")
    result = runs.run(
        artifact, examples, tmp_path / "out", eval_data=held_out, max_steps=1, batch_size=batch_size, packing=packing
    )
    ours, exact = (losses_of_examples(load(artifact), artifact, held_out) for load in (load_ours, load_exact))
    # The bf16 error of a mean over tokens is at most that of one of the examples. Batches of other shapes sum in
    # another order, which the factor of 2 covers.
    off = 2 * max(abs(one.mean() - other.mean()) for one, other in zip(ours, exact, strict=True))
    assert result.loss_before is not None
    assert abs(result.loss_before - torch.cat(exact).mean()) <= off
    # The same bound distinguishes a mean over tokens from a mean over examples.
    assert abs(result.loss_before - torch.stack([losses.mean() for losses in exact]).mean()) > off


def losses_of_examples(model: Any, artifact: Path, data: Path) -> list[Tensor]:
    """Return the losses of the trained tokens of each example, float64, computed one example at a time."""
    found = []
    for example in prepare_data([str(data)], load_tokenizer(artifact), DataSettings(max_length=64)):
        labels = example["labels"][1:]
        with torch.no_grad():
            logits = model(example["input_ids"][None]).logits[0, :-1].double()
        losses = -torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[:, None])[:, 0]
        found.append(losses[labels != IGNORED])
    return found


def test_a_tracker_of_transformers_gets_the_curves_and_both_evaluations(
    artifact: Path, examples: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = runs.run(artifact, examples, tmp_path / "out", eval_data=held_out, report_to=("tensorboard",))
    tracked = tensorboard_scalars(tmp_path / "out" / "runs")
    steps = [line for line in result.metrics if "loss" in line]
    assert tracked["train/loss"] == [(line["step"], pytest.approx(line["loss"])) for line in steps]
    assert tracked["train/learning_rate"] == [(line["step"], pytest.approx(line["learning_rate"])) for line in steps]
    assert tracked["eval/loss"] == [(0, pytest.approx(result.loss_before)), (6, pytest.approx(result.loss_after))]
    assert not list((tmp_path / "here").iterdir())  # TensorBoard must not write to its default directory


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files. A record is a length (u64), its checksum (u32), an Event, and its checksum (u32)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("events.*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            nbytes = int.from_bytes(data[position : position + 8], "little")
            event = Event.FromString(data[position + 12 : position + 12 + nbytes])
            position += 12 + nbytes + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {"dora": True, "schedule": "linear", "warmup": 2.0},
        {"modules_to_save": ("lm_head",), "bias": "all"},
        {"target_modules": ("q_proj", "up_proj"), "rslora": True},
        {"adapter_dtype": "bfloat16", "autocast": True},
        pytest.param({"packing": True}, marks=pytest.mark.slow),
        pytest.param({"group_by_length": True}, marks=pytest.mark.slow),
        pytest.param({"schedule": "constant", "warmup": 0.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_kind_of_adapter_and_schedule_trains_and_loads(
    artifact: Path, examples: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    result = runs.run(artifact, examples, tmp_path / "out", max_steps=3, save_every=3, **changed)
    weights = load_file(result.output / "adapter_model.safetensors")
    expected = torch.bfloat16 if changed.get("adapter_dtype") == "bfloat16" else torch.float32
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    if "target_modules" in changed:
        assert all("q_proj" in name or "up_proj" in name for name in weights)
    PeftModel.from_pretrained(load_model(artifact, device="cpu"), str(result.output))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapters_dtype_does_not_depend_on_packing(
    artifact: Path, examples: Path, tmp_path: Path, dtype: str
) -> None:
    """The other trainings of this file do not pack."""
    result = runs.run(artifact, examples, tmp_path / "out", max_steps=1, adapter_dtype=dtype, packing=True)
    stored = load_file(result.output / "adapter_model.safetensors").values()
    assert {str(tensor.dtype) for tensor in stored} == {f"torch.{dtype}"}


def test_an_output_directory_that_is_not_empty_is_rejected(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for output, advice in (
        (undisturbed.output, "resume='latest'"),
        (tmp_path / "full", "not empty"),
        (tmp_path / "no" / "where", "Create it"),
    ):
        with pytest.raises(TargetError, match=advice):
            runs.run(artifact, examples, output)


def test_a_training_opens_and_checks_the_artifact_once(
    artifact: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []

    def counted(data: bytes, path: Path) -> Manifest:
        parsed.append(path)
        return parse(data, path)

    monkeypatch.setattr("qformat.artifact.reading.manifest_parser.parse", counted)
    runs.run(artifact, examples, tmp_path / "out", max_steps=1)
    assert parsed == [artifact / "qformat.json"]
