"""File names and the form of repository names, on disk and on the Hub, each defined once."""

from __future__ import annotations

import re

MANIFEST_NAME = "qformat.json"
"""Manifest of an artifact (spec section 7)."""

SIGNATURE_NAME = "model.sig"
"""Signature of an artifact (spec section 7)."""

CARD_NAME = "README.md"
"""Model card, which the Hub shows as the page of a repository."""

PARTIAL_SUFFIX = ".partial"
"""Suffix of a file or directory that is still being written. The finished one has the same name without it."""

# Checkpoints in the layout of the Hub.
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
SINGLE_SHARD_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"

# Tokenizers: the files of `tokenizers` and of sentencepiece.
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_MODEL_NAME = "tokenizer.model"
CHAT_TEMPLATE_NAME = "chat_template.jinja"

# Adapters in the layout of PEFT, and qformat's record of the base model that an adapter was trained on.
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
BASE_RECORD_NAME = "qformat_base.json"

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
REPOSITORY_PATTERN = rf"{_PART}/{_PART}"
"""Regular expression of `owner/name`, for use in a larger one. `is_repository_name` also checks what it cannot."""

_REPOSITORY = re.compile(REPOSITORY_PATTERN)


def is_repository_name(text: str) -> bool:
    """Return whether a text has the form `owner/name` of a model or dataset repository on the Hub."""
    return _REPOSITORY.fullmatch(text) is not None and not any(bad in text for bad in ("--", "..")) and text[-1] != "."
