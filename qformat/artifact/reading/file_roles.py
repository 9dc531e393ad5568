"""Roles of the files of an artifact: which belong to the model, and which only accompany it (spec section 2.5)."""

from __future__ import annotations

import re

from qformat.artifact.manifest import FileRecord
from qformat.names import INDEX_NAME, MANIFEST_NAME, SIGNATURE_NAME

_DOCUMENT = r".*\.(?:md|rst|pdf|png|jpe?g|gif|webp|svg) | "
_LICENSE = r"(?: (?:LICEN[CS]E|COPYING|NOTICE|USE_POLICY)(?:[-_][^.]*)? | [^.]*[-_]LICEN[CS]E )(?:\.txt)?"
_TRAINING_RECORD = r"""
    training_args\.bin | trainer_state\.json | (?:optimizer|scheduler|scaler)\.pt | rng_state(?:_[0-9]+)?\.pth
  | (?:all|train|eval|test|predict)_results\.json | checkpoint-[0-9]+ | runs
"""

# With re.ASCII, only ASCII letters match in another case.
_FLAGS = re.VERBOSE | re.IGNORECASE | re.ASCII | re.DOTALL
_ACCOMPANYING = re.compile(_DOCUMENT + _LICENSE + " | " + _TRAINING_RECORD, _FLAGS)
_TRAINING = re.compile(_TRAINING_RECORD, _FLAGS)

UNSIGNED_NAMES = frozenset({".git", ".gitattributes", ".github", ".gitignore", ".cache"})
"""Entries that a signature need not cover (spec section 7.5): git and clients of the Hub create them."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""Suffixes of weight files, which some readers would load together with the shards."""


def accompanies(name: str, record: FileRecord | None = None) -> bool:
    """Return whether an entry of an artifact's directory only accompanies the model.

    Args:
        name: Name of the file or directory.
        record: Entry in the manifest, None if the manifest does not list it.
    """
    return (record is None or not record.is_shard) and _ACCOMPANYING.fullmatch(name) is not None


def is_training_record(name: str) -> bool:
    """Return whether a file or directory is the record of a training, which no manifest needs to list."""
    return _TRAINING.fullmatch(name) is not None


def can_be_accepted(name: str) -> bool:
    """Return whether a changed or additional file can be accepted: it is neither weights nor the index."""
    fixed = name in {INDEX_NAME, MANIFEST_NAME, SIGNATURE_NAME} or name.startswith(".")
    return not (fixed or name.lower().endswith(_WEIGHT_SUFFIXES) or is_training_record(name))
