"""accelerate saves every tensor of a loaded model, and a loop that died resumes to the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open

from tests.clients.saving.accelerate_loop import N_STEPS, losses, with_adapters
from tests.clients.saving.conftest import Load
from tests.clients.saving.loaders import load_by
from tests.repository import ROOT


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """Reset what accelerate keeps for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained_norms(model: Any) -> Any:
    return model


def written(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - it is no dict
    return found


@pytest.mark.parametrize("max_shard_size", ["10GB", "30KB"])
def test_save_model_writes_every_tensor(load: Load, tmp_path: Path, max_shard_size: str) -> None:
    model = load()
    state = model.state_dict()
    accelerator = Accelerator()
    accelerator.save_model(accelerator.prepare(model), str(tmp_path), max_shard_size=max_shard_size)
    found = written(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "10GB"
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)) for name, tensor in found.items())


@pytest.mark.parametrize("train", [with_adapters, trained_norms])
def test_a_loop_that_stopped_resumes_to_the_same_losses(load: Load, tmp_path: Path, train: Any) -> None:
    expected = losses(train(load()), tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses(train(load()), tmp_path, save_after=3) == expected[:3]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses(train(load()), tmp_path, resume=True) == expected[3:]
    assert len(expected) == N_STEPS
    assert expected[-1] < expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["load_model", "register"])
def test_a_loop_that_was_killed_resumes_to_the_same_losses(artifact: Path, loader: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.clients.saving.accelerate_loop", str(artifact), loader, str(tmp_path), "3"]
    # As many threads as here, because the order of a sum depends on it.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    expected = losses(with_adapters(load_by(loader, artifact)), tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses(with_adapters(load_by(loader, artifact)), tmp_path, resume=True) == expected[3:]
