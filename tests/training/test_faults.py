"""Trainings that are killed or run out of disk space: resuming gives the bytes of an uninterrupted training."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qformat.errors import TargetError
from qformat.training import checkpoints
from qformat.training.result import TrainingResult
from tests.repository import ROOT
from tests.standstill import wait_until_held
from tests.training import runs

SCRIPT = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.standstill import hold_call
from tests.training import runs
artifact, data, output, resume, held_at = sys.argv[1:]
hold_call(os, ("fsync", "rename"), int(held_at))
runs.run(Path(artifact), Path(data), Path(output), resume=resume or None)
"""

FIRST_KILLS, SECOND_KILLS = range(42), range(9)
"""Numbers of fsync and rename calls before a kill. There are 53 calls: 6 for the prepared data, 12 for each of three
checkpoints, and 11 at the end. A resumed run makes at least those at the end."""


def start(artifact: Path, data: Path, output: Path, *, resume: str, held_at: int) -> subprocess.Popen[str]:
    """Start a training with SHORT settings in a separate process, which stops at disk call `held_at`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(artifact), str(data), str(output), resume, str(held_at)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9))
def test_a_killed_process_resumes_to_the_same_bytes(
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

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(TargetError) as refused:
            runs.run(artifact, examples, output, resume="latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    told = str(refused.value)
    assert "checkpoint-4: cannot be written" in told
    assert "checkpoint-2 is intact. Make room and run the same command again, with resume='latest'" in told
    assert checkpoints.CheckpointFolder(output, keep=5).steps() == [2]
    assert not (output / "partial").exists()
    runs.run(artifact, examples, output, resume="latest")
    assert runs.adapter_bytes(output) == runs.adapter_bytes(undisturbed.output)
