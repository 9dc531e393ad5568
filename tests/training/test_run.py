"""Whole trainings: what they leave behind, and that nothing but the settings decides about the adapter's bytes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qformat.artifact.manifest import Manifest
from qformat.artifact.reading.manifest_parser import parse
from qformat.errors import AdapterError, DataError, DeviceMemoryError, DivergenceError, TargetError, UsageError
from qformat.model.load import load_model, load_tokenizer
from qformat.training.optimizer.page_device import PlainPages
from qformat.training.run import TrainingResult
from qformat.training.trainer import AdapterTrainer
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


def test_the_loss_falls(artifact: Path, examples: Path, held_out: Path, tmp_path: Path) -> None:
    # Random weights barely matter: the output layer must be trained, too.
    strong: dict[str, Any] = {"max_steps": 20, "learning_rate": 0.1, "modules_to_save": ("lm_head",)}
    result = runs.run(artifact, examples, tmp_path / "out", eval_data=held_out, **strong)
    assert result.loss_before is not None
    assert result.loss_after is not None
    assert result.loss_before == pytest.approx(math.log(runs.VOCABULARY), rel=0.1)  # a random model guesses
    assert result.loss_after < 0.75 * result.loss_before


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
    [{"optim": "adamw"}, {"page_budget": "0"}, {"page_budget": "20KiB"}, {"save_every": 5}, {"log_every": 3}],
    ids=str,
)
def test_what_must_not_matter_does_not(
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


def test_an_evaluation_weighs_every_token_alike(artifact: Path, examples: Path, held_out: Path, tmp_path: Path) -> None:
    losses = [
        runs.run(
            artifact,
            examples,
            tmp_path / f"by_{size}",
            eval_data=held_out,
            max_steps=1,
            batch_size=size,
            packing=packed,
        ).loss_before
        for size, packed in ((1, False), (2, False), (3, True))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] == pytest.approx(losses[2], rel=2e-3)


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
    assert not list((tmp_path / "here").iterdir())  # TensorBoard's own idea of where to write


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files: records of length (u64), its checksum (u32), an Event, and a checksum (u32)."""
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


RESUMED: list[dict[str, Any]] = [
    {},
    {"optim": "paged_adamw_8bit"},
    {"packing": True},
    {"epochs": 3.0, "max_steps": None},
    {"epochs": 2.0, "max_steps": None, "group_by_length": True},
]


@pytest.mark.parametrize("changed", RESUMED, ids=str)
def test_a_resumed_training_ends_in_the_same_bytes(
    artifact: Path, examples: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    whole = runs.run(artifact, examples, tmp_path / "whole", **changed)
    stopped = _stopped_at(artifact, examples, tmp_path / "stopped", step=5, **changed)
    resumed = runs.run(artifact, examples, stopped, resume="latest", **changed)
    assert resumed.steps == whole.steps
    assert runs.adapter_bytes(resumed.output) == runs.adapter_bytes(whole.output)
    losses = [[line["loss"] for line in result.metrics] for result in (whole, resumed)]
    assert losses[0] == losses[1]
    assert [line["tokens"] for line in whole.metrics] == [line["tokens"] for line in resumed.metrics]


def test_a_training_that_ended_within_an_epoch_takes_no_step_more(
    artifact: Path, examples: Path, tmp_path: Path
) -> None:
    first = runs.run(artifact, examples, tmp_path / "out", max_steps=4)
    before = runs.adapter_bytes(first.output)
    again = runs.run(artifact, examples, tmp_path / "out", max_steps=4, resume="latest")
    assert again.steps == 4
    assert runs.adapter_bytes(again.output) == before


def test_a_finished_training_can_be_resumed_for_nothing(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output, output)
    (output / "adapter_model.safetensors").unlink()
    resumed = runs.run(artifact, examples, output, resume="latest")
    assert runs.adapter_bytes(resumed.output) == runs.adapter_bytes(undisturbed.output)


@pytest.mark.parametrize(
    "changed",
    [
        {"dora": True},
        {"rslora": True},
        {"bias": "all"},
        {"modules_to_save": ("lm_head",)},
        {"target_modules": ("q_proj", "up_proj")},
        {"adapter_dtype": "bfloat16"},
        {"packing": True},
        {"group_by_length": True},
        {"autocast": True},
        {"schedule": "constant", "warmup": 0.0},
        {"schedule": "linear", "warmup": 2.0},
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


def test_the_adapters_dtype_does_not_depend_on_packing(artifact: Path, examples: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        for packing in (False, True):
            output = tmp_path / f"{dtype}{packing}"
            result = runs.run(artifact, examples, output, max_steps=1, adapter_dtype=dtype, packing=packing)
            stored = load_file(result.output / "adapter_model.safetensors").values()
            assert {str(tensor.dtype) for tensor in stored} == {f"torch.{dtype}"}


def test_a_loss_that_is_no_number_stops_before_the_weights_change(
    artifact: Path, examples: Path, tmp_path: Path
) -> None:
    with pytest.raises(DivergenceError, match=r"step \d+: the .* is (nan|inf).*good checkpoint is checkpoint-"):
        runs.run(artifact, examples, tmp_path / "out", learning_rate=1e36, warmup=0.0, max_steps=12, save_every=1)


def test_a_gradient_that_is_no_number_names_the_step(
    artifact: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AdapterTrainer.training_step

    def poisoned(self: AdapterTrainer, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = original(self, model, inputs, num_items_in_batch)
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(AdapterTrainer, "training_step", poisoned)
    with pytest.raises(DivergenceError, match=r"step 3: the norm of the gradient is nan.*checkpoint-2"):
        runs.run(artifact, examples, tmp_path / "out")


def test_running_out_of_memory_once_changes_nothing(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_micro_batches(monkeypatch, {3, 8})
    result = runs.run(artifact, examples, tmp_path / "out")
    assert runs.adapter_bytes(result.output) == runs.adapter_bytes(undisturbed.output)
    for name in ("loss", "grad_norm", "tokens", "mean_token_accuracy"):
        assert [line[name] for line in result.metrics] == [line[name] for line in undisturbed.metrics]


def test_running_out_of_memory_in_an_evaluation_changes_nothing(
    artifact: Path,
    examples: Path,
    held_out: Path,
    tmp_path: Path,
    undisturbed: TrainingResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _fail_micro_batches(monkeypatch, {2, 8})  # the first ones evaluate, and so do those after two steps
    result = runs.run(artifact, examples, tmp_path / "out", eval_data=held_out, eval_every=2)
    assert runs.adapter_bytes(result.output) == runs.adapter_bytes(undisturbed.output)


def test_running_out_of_memory_elsewhere_is_told_in_words(
    artifact: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise torch.OutOfMemoryError("no memory left, says the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qformat.training.run.load_model", lambda *_, **__: fails())
        with pytest.raises(DeviceMemoryError, match="too little memory to load the model"):
            runs.run(artifact, examples, tmp_path / "out")
    monkeypatch.setattr(PlainPages, "allocate", fails)
    with pytest.raises(DeviceMemoryError, match=r"to update the weights.*--dry-run"):
        runs.run(artifact, examples, tmp_path / "out")


@pytest.mark.parametrize(("optim", "advice"), [("paged_adamw_32bit", "Lower the batch size"), ("adamw", "paged")])
def test_running_out_of_memory_for_good_says_what_to_lower(
    artifact: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, advice: str
) -> None:
    _fail_micro_batches(monkeypatch, set(range(3, 100)))
    with pytest.raises(DeviceMemoryError, match=advice):
        runs.run(artifact, examples, tmp_path / "out", optim=optim)


def test_an_output_that_holds_something_is_refused(
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


def test_a_training_is_resumed_with_the_same_settings_data_and_weights_only(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output, output)
    with pytest.raises(UsageError, match=r"learning_rate was 0\.01 and is 0\.02"):
        runs.run(artifact, examples, output, resume="latest", learning_rate=2e-2)
    other = runs.write_examples(tmp_path / "other.jsonl", seed=5)
    with pytest.raises(DataError, match="is not the data that checkpoint-6 was trained with"):
        runs.run(artifact, other, output, resume="latest")
    weights = runs.make_artifact(tmp_path, seed=1)
    with pytest.raises(UsageError, match="was trained on other weights"):
        runs.run(weights, examples, output, resume="latest")
    with pytest.raises(UsageError, match="holds no checkpoint"):
        runs.run(artifact, examples, tmp_path / "empty", resume="latest")
    with pytest.raises(UsageError, match="There are checkpoint-2, checkpoint-4, checkpoint-6"):
        runs.run(artifact, examples, output, resume="checkpoint-3")


def test_a_damaged_checkpoint_is_refused_and_a_whole_one_offered(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output, output)
    damaged = output / "checkpoint-6" / "optimizer.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(AdapterError, match=r"optimizer\.pt: is damaged.*resume='checkpoint-4'"):
        runs.run(artifact, examples, output, resume="latest")
    resumed = runs.run(artifact, examples, output, resume="checkpoint-4")
    assert runs.adapter_bytes(resumed.output) == runs.adapter_bytes(undisturbed.output)


def _stopped_at(artifact: Path, data: Path, output: Path, *, step: int, **changed: Any) -> Path:
    """Train until an exception in the middle of a step."""
    n_calls = 0
    original = AdapterTrainer.training_step

    def stops(self: AdapterTrainer, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if self.state.global_step == step - 1 and n_calls % 2 == 0:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            runs.run(artifact, data, output, **changed)
    return output


def _fail_micro_batches(monkeypatch: pytest.MonkeyPatch, which: set[int]) -> None:
    """Let some calls of the loss run out of memory after their forward pass, dropout drawn."""
    original = AdapterTrainer.compute_loss
    n_calls = 0

    def fails(self: AdapterTrainer, *arguments: Any, **named: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        loss = original(self, *arguments, **named)
        if n_calls in which:
            raise torch.OutOfMemoryError("no memory left, says the test")
        return loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", fails)


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
