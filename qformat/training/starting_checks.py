"""Checks the output directory before a training starts, and the settings and data before it resumes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.output_kind import reading_output
from qformat.errors import DataError, Option, TargetError, UsageError
from qformat.strict_json import Json
from qformat.training.checkpoints import LOCK_NAME, PARTIAL_NAME, Checkpoint, CheckpointFolder
from qformat.training.metrics import METRICS_NAME

_NO_TRAINING = {PARTIAL_NAME, METRICS_NAME, LOCK_NAME, "runs"}
"""Files that a training leaves if it ends before its first checkpoint. TensorBoard writes `runs`."""


def check_free(output: Path) -> None:
    """Check that a new training can start in an output directory.

    Raises:
        TargetError: The directory holds a training or other files, or cannot be created.
    """
    if CheckpointFolder(output, keep=1).steps():
        raise TargetError(
            f"{output}: already contains a training. Resume it with ",
            Option("resume", "latest"),
            ", or choose another directory",
        )
    with reading_output(output):
        if os.path.isdir(output) and not set(os.listdir(output)) <= _NO_TRAINING:
            raise TargetError(f"{output}: is not empty. Choose another directory")
    if os.path.lexists(output) and not os.path.isdir(output):
        raise TargetError(f"{output}: exists and is not a directory. Choose another path")
    if not os.path.isdir(output.absolute().parent):
        raise TargetError(f"{output.parent}: directory does not exist. Create it first")


def check_same_training(
    checkpoint: Checkpoint, facts: JsonObject, *, artifact: Path, data: Sequence[str], eval_data: Sequence[str]
) -> None:
    """Check that a training would resume a checkpoint with the same data, weights and settings.

    Args:
        checkpoint: Checkpoint to resume from.
        facts: Facts about the training that is about to resume.
        artifact: Directory of the artifact, for messages.
        data: Sources of training data, for messages.
        eval_data: Sources of held-out data, for messages.

    Raises:
        DataError: The data differ from those of the checkpoint.
        UsageError: The weights or the settings differ from those of the checkpoint.
    """
    before = checkpoint.facts
    for name, source in (("data", data), ("eval_data", eval_data)):
        if before[name] != facts[name]:
            raise DataError(
                "data_changed",
                ", ".join(source) or "no file",
                f"differs from the data that {checkpoint.folder.name} was trained with",
                place=None,
                next_step="Restore the original data, or start a new training in another directory",
            )
    if before["base"] != facts["base"]:
        raise UsageError(
            f"{artifact}: {checkpoint.folder.name} was trained on other weights (found {_in_words(facts['base'])}, "
            f"expected {_in_words(before['base'])}). Use the same artifact, or start a new training in another "
            "directory"
        )
    old, new = before["settings"], facts["settings"]
    assert isinstance(old, dict)
    assert isinstance(new, dict)
    differences = [
        word
        for name in new
        if old.get(name) != new[name]
        for word in ("; ", Option(name), f" was {old.get(name)!r} and is now {new[name]!r}")
    ]
    if differences:
        raise UsageError(
            f"{checkpoint.folder}: cannot resume with different settings: ",
            *differences[1:],
            ". Use the same settings, or start a new training in another directory",
        )


def _in_words(base: Json) -> str:
    assert isinstance(base, Mapping)
    return f"{base['name']} ({base['digest']})"
