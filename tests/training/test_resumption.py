"""Resumed trainings give the same bytes. Trainings that cannot be resumed are rejected."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.errors import AdapterError, ArtifactError, DataError, UsageError
from qformat.training.checkpoints import SEAL_NAME
from qformat.training.result import TrainingResult
from tests.training import runs
from tests.training.interruptions import stopped_at

RESUMED: list[dict[str, Any]] = [
    {"packing": True},
    {"epochs": 2.0, "max_steps": None, "group_by_length": True},
]
RESUMED_SLOWLY: list[dict[str, Any]] = [{}, {"optim": "paged_adamw_8bit"}, {"epochs": 3.0, "max_steps": None}]


@pytest.mark.parametrize(
    "changed", [*RESUMED, *(pytest.param(changed, marks=pytest.mark.slow) for changed in RESUMED_SLOWLY)], ids=str
)
def test_a_resumed_training_gives_the_same_bytes(
    artifact: Path, examples: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    whole = runs.run(artifact, examples, tmp_path / "whole", **changed)
    stopped = stopped_at(artifact, examples, tmp_path / "stopped", step=5, **changed)
    resumed = runs.run(artifact, examples, stopped, resume="latest", **changed)
    assert resumed.steps == whole.steps
    assert runs.adapter_bytes(resumed.output) == runs.adapter_bytes(whole.output)
    losses = [[line["loss"] for line in result.metrics] for result in (whole, resumed)]
    assert losses[0] == losses[1]
    assert [line["tokens"] for line in whole.metrics] == [line["tokens"] for line in resumed.metrics]


def test_a_training_that_ended_within_an_epoch_takes_no_further_step(
    artifact: Path, examples: Path, tmp_path: Path
) -> None:
    first = runs.run(artifact, examples, tmp_path / "out", max_steps=4)
    before = runs.adapter_bytes(first.output)
    again = runs.run(artifact, examples, tmp_path / "out", max_steps=4, resume="latest")
    assert again.steps == 4
    assert runs.adapter_bytes(again.output) == before


def test_resuming_a_finished_training_changes_nothing(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output, output)
    (output / "adapter_model.safetensors").unlink()
    resumed = runs.run(artifact, examples, output, resume="latest")
    assert runs.adapter_bytes(resumed.output) == runs.adapter_bytes(undisturbed.output)


def rewritten(checkpoint: Path, name: str, data: bytes | None) -> None:
    """Replace a file of a checkpoint and renew its digests, as another program would. None: forget the facts."""
    seal = strict_json.loads((checkpoint / SEAL_NAME).read_bytes(), path=name, max_nbytes=2**20, error=ArtifactError)
    if data is None:
        seal["facts"] = {}
    else:
        (checkpoint / name).write_bytes(data)
        seal["files"][name] = {"nbytes": len(data), "xxh3": xxh3(data)}
    del seal["seal_xxh3"]
    seal["seal_xxh3"] = xxh3(strict_json.dumps(seal).encode())
    (checkpoint / SEAL_NAME).write_text(strict_json.dumps(seal, indent=2))


class Foreign:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code of the pickle ran",)


PICKLE = pickle.dumps(Foreign())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("optimizer.pt", PICKLE),
        ("optimizer.pt", pickle.dumps({"state": {}, "param_groups": []})),
        ("scheduler.pt", b""),
        ("rng_state.pth", PICKLE),
        ("trainer_state.json", b"[]"),
        ("trainer_state.json", b'{"global_step": "x"}'),
        ("adapter_model.safetensors", save({"weird": torch.zeros(2)})),
        ("adapter_model.safetensors", b"{}"),
        (SEAL_NAME, None),
    ],
)
def test_a_state_of_another_program_is_rejected_with_its_file(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult, name: str, data: bytes | None
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output, output)
    rewritten(output / "checkpoint-4", name, data)
    with pytest.raises(AdapterError, match=rf"checkpoint-4/.*{re.escape(name)}.*(not the state of|not fit) this"):
        runs.run(artifact, examples, output, resume="checkpoint-4")


def test_a_training_resumes_only_with_the_same_settings_data_and_weights(
    artifact: Path, examples: Path, tmp_path: Path, undisturbed: TrainingResult
) -> None:
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output, output)
    with pytest.raises(UsageError, match=r"learning_rate was 0\.01 and is now 0\.02"):
        runs.run(artifact, examples, output, resume="latest", learning_rate=2e-2)
    other = runs.write_examples(tmp_path / "other.jsonl", seed=5)
    with pytest.raises(DataError, match="differs from the data that checkpoint-6 was trained with"):
        runs.run(artifact, other, output, resume="latest")
    weights = runs.make_artifact(tmp_path, seed=1)
    with pytest.raises(UsageError, match="was trained on other weights"):
        runs.run(weights, examples, output, resume="latest")
    with pytest.raises(UsageError, match="has no checkpoint to resume from"):
        runs.run(artifact, examples, tmp_path / "empty", resume="latest")
    with pytest.raises(UsageError, match="Existing checkpoints: checkpoint-2, checkpoint-4, checkpoint-6"):
        runs.run(artifact, examples, output, resume="checkpoint-3")


def test_a_damaged_checkpoint_is_rejected_and_an_intact_one_suggested(
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
