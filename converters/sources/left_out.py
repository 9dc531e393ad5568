"""The entries of a checkpoint's directory that are neither read nor carried over, each with the reason."""

from __future__ import annotations

from collections.abc import Collection

from qformat.artifact.reading.file_roles import accompanies, is_training_record
from qformat.artifact.reading.side_files import is_side_file
from qformat.converters.sources.checkpoint_folder import CheckpointFiles
from qformat.names import CARD_NAME, CONFIG_NAME

DOCUMENT = "documentation"
TRAINING = "record of a training"
DIRECTORY = "directory"
WEIGHTS = "other weights"
UNKNOWN = "not known to belong to a model"

_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json", ".npz",
)  # fmt: skip


def left_out(files: CheckpointFiles, used: Collection[str]) -> dict[str, str]:
    """Return the reason for every entry that is left out, keyed by name. A directory's name ends with a slash.

    Args:
        files: The files of the checkpoint.
        used: Names of the files that hold the tensors, and of their index.
    """
    folders = set(files.folders())
    entries = {*files.names(), *folders} - {*used, CONFIG_NAME}
    reasons: dict[str, str] = {}
    for name in sorted(entries):
        # Names that begin with a dot belong to git or to clients of the Hub.
        if not name.startswith(".") and (name in folders or not is_side_file(name)):
            reasons[f"{name}/" if name in folders else name] = _reason(name, is_folder=name in folders)
    return reasons


def _reason(name: str, *, is_folder: bool) -> str:
    if is_training_record(name):
        return TRAINING
    if is_folder:
        return DIRECTORY
    if accompanies(name) or name == CARD_NAME:
        return DOCUMENT
    return WEIGHTS if name.endswith(_WEIGHT_SUFFIXES) else UNKNOWN
