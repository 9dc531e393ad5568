"""The names that files and repositories have, each once: what is on disk and on the Hub is spelled here."""

from __future__ import annotations

import re

MANIFEST_NAME = "qformat.json"
"""The manifest of an artifact (spec section 7)."""

SIGNATURE_NAME = "model.sig"
"""The signature of an artifact (spec section 7)."""

CARD_NAME = "README.md"
"""The model card, as the Hub shows it."""

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file or folder that is still being written; the finished one has the name without it."""

# A checkpoint in the layout of the Hub.
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
SINGLE_SHARD_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"

# Its tokenizer: the files of `tokenizers`, and of sentencepiece.
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_MODEL_NAME = "tokenizer.model"

# An adapter of PEFT, and our record of the base that it was trained on.
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
BASE_RECORD_NAME = "qformat_base.json"

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
REPOSITORY_PATTERN = rf"{_PART}/{_PART}"
"""The form of owner/name, for a larger pattern; `is_repository_name` refuses what the pattern cannot."""

_REPOSITORY = re.compile(REPOSITORY_PATTERN)


def is_repository_name(text: str) -> bool:
    """Whether a text has the form `owner/name` that the Hub gives to repositories of models and datasets."""
    return _REPOSITORY.fullmatch(text) is not None and not any(bad in text for bad in ("--", "..")) and text[-1] != "."
