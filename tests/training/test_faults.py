"""Trainings that are killed or run out of disk space: resuming gives the bytes of an uninterrupted training."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qformat.errors import TargetError
from qformat.training import checkpoints
from qformat.training.result import TrainingResult
from tests.repository import ROOT
from tests.standstill import GUARD_S, wait_until_held
from tests.training import runs

SCRIPT = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.standstill import hold_call
from tests.training import runs
artifact, data, output, resume, held_at = sys.argv[1:]
if held_at:
    hold_call(os, ("fsync", "rename"), int(held_at))
runs.run(Path(artifact), Path(data), Path(output), resume=resume or None)
"""

FIRST_KILLS, SECOND_KILLS = range(42), range(9)
"""Numbers of fsync and rename calls before a kill. There are 53 calls: 6 for the prepared data, 12 for each of three
checkpoints, and 11 at the end. A resumed run makes at least those at the end."""


def start(
    artifact: Path, data: Path, output: Path, *, resume: str = "", held_at: int | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start a training with SHORT settings in a separate process, which stops at disk call `held_at`, if given."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    held = "" if held_at is None else str(held_at)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(artifact), str(data), str(output), resume, held],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
def test_a_killed_training_resumes_to_the_same_bytes(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult, seed: int
) -> None:
    chosen = random.Random(seed)
    output = tmp_path / "out"
    for kills in chosen.choice([(FIRST_KILLS,), (FIRST_KILLS, SECOND_KILLS)]):
        whole = checkpoints.CheckpointFolder(output, keep=1).last_intact()
        if whole is None:
            shutil.rmtree(output, ignore_errors=True)
        resume = "" if whole is None else "latest"
        process = start(artifact, examples, output, resume=resume, held_at=chosen.choice(kills))
        wait_until_held(process)
        process.kill()
        process.communicate()
    whole = checkpoints.CheckpointFolder(output, keep=1).last_intact()
    if whole is None:
        shutil.rmtree(output, ignore_errors=True)
    runs.run(artifact, examples, output, resume=None if whole is None else "latest")
    assert runs.adapter_bytes(output) == runs.adapter_bytes(undisturbed.output)
    assert not (output / "partial").exists()


def test_a_full_disk_at_a_checkpoint_leaves_the_previous_one_intact(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    """A system limit: no file may grow beyond the size of the adapter, and optimizer.pt is twice as large."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output, output)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(output / name)
    (output / "adapter_model.safetensors").unlink()
    limit = 2 * len(runs.adapter_bytes(undisturbed.output)) * 9 // 10

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(artifact, examples, output, resume="latest", preexec_fn=limited)
    _, told = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1
    assert "TargetError" in told
    assert "checkpoint-4: cannot be written" in told
    assert "checkpoint-2 is intact. Make room and resume with resume='latest'" in told
    assert checkpoints.CheckpointFolder(output, keep=5).steps() == [2]
    assert not (output / "partial").exists()
    runs.run(artifact, examples, output, resume="latest")
    assert runs.adapter_bytes(output) == runs.adapter_bytes(undisturbed.output)


@pytest.mark.parametrize("call", ["torch.save", "fsync", "rename"])
def test_a_failed_write_of_a_checkpoint_is_explained(
    artifact: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    n_calls = 0

    def fails(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls == 4 and call != "rename":
                raise OSError(28, "No space left on device")
            if call == "rename" and "checkpoint-4" in str(arguments):
                raise OSError(28, "No space left on device")
            return original(*arguments, **named)

        return run

    module, name = {"torch.save": (torch, "save"), "fsync": (os, "fsync"), "rename": (os, "rename")}[call]
    monkeypatch.setattr(module, name, fails(getattr(module, name)))
    with pytest.raises(TargetError, match=r"space left|not enough disk space|Make room"):
        runs.run(artifact, examples, tmp_path / "out")
    monkeypatch.undo()
    folder = checkpoints.CheckpointFolder(tmp_path / "out", keep=5)
    assert all(checkpoints.read_checkpoint(folder.folder(step)).step == step for step in folder.steps())
    assert not (tmp_path / "out" / "partial").exists()
