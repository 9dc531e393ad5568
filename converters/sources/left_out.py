"""The entries of a checkpoint's directory that are neither read nor carried over, each with the reason."""

from __future__ import annotations

from collections.abc import Collection

from qformat.artifact.limits import MAX_CONFIG_NBYTES
from qformat.artifact.reading.file_roles import accompanies, is_training_record
from qformat.artifact.reading.side_files import is_side_file
from qformat.converters.sources.checkpoint_folder import CheckpointFiles
from qformat.errors import SourceError
from qformat.names import CARD_NAME, CONFIG_NAME

DOCUMENT = "documentation"
TRAINING = "record of a training"
DIRECTORY = "directory"
MODULE = "directory that sentence-transformers needs beside modules.json; an artifact has no directories"
WEIGHTS = "other weights"
UNKNOWN = "not known to belong to a model"

_MODULES_NAME = "modules.json"
"""The list of modules of sentence-transformers, each with its directory."""

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
    modules = _folders_of_modules(files) & folders
    entries = {*files.names(), *folders} - {*used, CONFIG_NAME}
    reasons: dict[str, str] = {}
    for name in sorted(entries):
        # Names that begin with a dot belong to git or to clients of the Hub.
        if not name.startswith(".") and (name in folders or not is_side_file(name)):
            reason = MODULE if name in modules else _reason(name, is_folder=name in folders)
            reasons[f"{name}/" if name in folders else name] = reason
    return reasons


def _folders_of_modules(files: CheckpointFiles) -> set[str]:
    """Return the top directories that modules.json names. A damaged file names none; it is carried over."""
    if not files.has(_MODULES_NAME):
        return set()
    try:
        modules = files.read_json(_MODULES_NAME, max_nbytes=MAX_CONFIG_NBYTES)
    except SourceError:
        return set()
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return {path.partition("/")[0] for path in paths if isinstance(path, str)}


def _reason(name: str, *, is_folder: bool) -> str:
    if is_training_record(name):
        return TRAINING
    if is_folder:
        return DIRECTORY
    if accompanies(name) or name == CARD_NAME:
        return DOCUMENT
    return WEIGHTS if name.endswith(_WEIGHT_SUFFIXES) else UNKNOWN
