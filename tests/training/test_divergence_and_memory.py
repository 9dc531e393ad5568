"""Non-finite losses and gradients, and devices that run out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from qformat.errors import ArtifactError, DeviceMemoryError, DivergenceError
from qformat.training.optimizer.page_device import PlainPages
from qformat.training.result import TrainingResult
from qformat.training.trainer import AdapterTrainer
from tests.training import runs
from tests.training.interruptions import fail_micro_batches


def test_a_nonfinite_loss_stops_the_training_before_the_weights_change(
    artifact: Path, examples: Path, tmp_path: Path
) -> None:
    with pytest.raises(DivergenceError, match=r"step \d+: the .* is (nan|inf).*intact checkpoint is checkpoint-"):
        runs.run(artifact, examples, tmp_path / "out", learning_rate=1e36, warmup=0.0, max_steps=12, save_every=1)


def test_a_nonfinite_gradient_is_reported_with_its_step(
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


def test_the_learning_rate_is_not_blamed_for_the_first_step(
    artifact: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterTrainer, "_run_micro_batch", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(DivergenceError, match=r"step 1: the loss is inf.*whether \S+ itself gives a finite") as caught:
        runs.run(artifact, examples, tmp_path / "out")
    assert artifact.name in str(caught.value)
    assert "learning rate" not in str(caught.value)


def test_a_first_step_that_fails_is_blamed_on_the_config_of_the_model(
    artifact: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda _, x: x @ x.new_ones(3, 3))
    with pytest.raises(ArtifactError, match=r"config\.json: the model that it describes cannot run: ") as caught:
        runs.run(artifact, examples, tmp_path / "out")
    assert caught.value.path == str(artifact / "config.json")


def test_running_out_of_memory_once_changes_nothing(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_micro_batches(monkeypatch, {3, 8})
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
    fail_micro_batches(monkeypatch, {2, 8})  # in the evaluation before the training, and in that after two steps
    result = runs.run(artifact, examples, tmp_path / "out", eval_data=held_out, eval_every=2)
    assert runs.adapter_bytes(result.output) == runs.adapter_bytes(undisturbed.output)


def test_running_out_of_memory_elsewhere_is_explained(
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
def test_running_out_of_memory_twice_says_what_to_lower(
    artifact: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, advice: str
) -> None:
    fail_micro_batches(monkeypatch, set(range(3, 100)))
    with pytest.raises(DeviceMemoryError, match=advice):
        runs.run(artifact, examples, tmp_path / "out", optim=optim)
