"""Stops trainings in the middle of a step, and lets micro-batches run out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qformat.training.trainer import AdapterTrainer
from tests.training import runs


def stopped_at(artifact: Path, data: Path, output: Path, *, step: int, **changed: Any) -> Path:
    """Train until an exception stops the training in the middle of a step."""
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


def fail_micro_batches(monkeypatch: pytest.MonkeyPatch, which: set[int]) -> None:
    """Let some calls of the loss run out of memory after their forward pass, which has drawn dropout."""
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
