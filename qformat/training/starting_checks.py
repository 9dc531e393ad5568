"""What must be so before a training starts in a folder, or continues there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.errors import DataError, Option, TargetError, UsageError
from qformat.strict_json import Json
from qformat.training.checkpoints import LOCK_NAME, PARTIAL_NAME, Checkpoint, CheckpointFolder
from qformat.training.metrics import METRICS_NAME

_NO_TRAINING = {PARTIAL_NAME, METRICS_NAME, LOCK_NAME, "runs"}
"""What a training leaves that never came to a checkpoint; runs is TensorBoard's."""


def check_free(output: Path) -> None:
    """Raise TargetError for an output folder that cannot take a new training."""
    if CheckpointFolder(output, keep=1).steps():
        raise TargetError(
            f"{output}: holds a training already. Continue it with ",
            Option("resume", "latest"),
            ", or choose another name",
        )
    if output.is_dir() and not {entry.name for entry in output.iterdir()} <= _NO_TRAINING:
        raise TargetError(f"{output}: is not empty. Choose another name")
    if output.exists() and not output.is_dir():
        raise TargetError(f"{output}: exists and is no folder. Choose another name")
    if not output.absolute().parent.is_dir():
        raise TargetError(f"{output.parent}: there is no such folder. Create it first")


def check_same_training(
    checkpoint: Checkpoint, facts: JsonObject, *, artifact: Path, data: Sequence[str], eval_data: Sequence[str]
) -> None:
    """Compare what a checkpoint noted with what is about to continue it.

    Raises DataError or UsageError naming what is not as it was when the checkpoint was written.
    """
    before = checkpoint.facts
    for name, source in (("data", data), ("eval_data", eval_data)):
        if before[name] != facts[name]:
            raise DataError(
                "data_changed",
                ", ".join(source) or "no file",
                f"is not the data that {checkpoint.folder.name} was trained with",
                place=None,
                next_step="Bring it back as it was, or train anew in another folder",
            )
    if before["base"] != facts["base"]:
        raise UsageError(
            f"{artifact}: {checkpoint.folder.name} was trained on other weights: {_in_words(before['base'])}, "
            f"and this is {_in_words(facts['base'])}. Use the same artifact, or train anew in another folder"
        )
    old, new = before["settings"], facts["settings"]
    assert isinstance(old, dict)
    assert isinstance(new, dict)
    differences = [
        word
        for name in new
        if old.get(name) != new[name]
        for word in ("; ", Option(name), f" was {old.get(name)!r} and is {new[name]!r}")
    ]
    if differences:
        raise UsageError(
            f"{checkpoint.folder}: cannot be continued with other settings: ",
            *differences[1:],
            ". Use the same ones, or train anew in another folder",
        )


def _in_words(base: Json) -> str:
    assert isinstance(base, Mapping)
    return f"{base['name']} ({base['digest']})"
