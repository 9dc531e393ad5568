"""The files that an artifact carries over from its checkpoint: a fixed list of kinds, which includes no weights."""

from __future__ import annotations

import re

from qformat.names import GENERATION_CONFIG_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_MODEL_NAME, TOKENIZER_NAME

_NAMES = {
    GENERATION_CONFIG_NAME,
    # tokenizers
    TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_MODEL_NAME, "tokenizer.model.v3", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "bpe.codes", "tekken.json", "normalizer.json",
    "spm.model", "vocab.bpe", "encoder.json",
    # sentence-transformers: without modules.json, it would pool by the mean, whatever the model needs
    "modules.json", "config_sentence_transformers.json",
    # chat templates
    "chat_template.jinja", "chat_template.json",
    # processors of multimodal models
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json",
}  # fmt: skip

_PATTERNS = re.compile(
    r"""
      .+\.tiktoken | .+\.spm
    | sentence_[a-z-]+_config\.json                      # sentence-transformers
    | [A-Za-z0-9_]+\.py                                  # custom model code
    | (?:LICEN[CS]E|COPYING|NOTICE|USE_POLICY)(?:[._-].*)?
    | .*[._-]LICEN[CS]E(?:\.(?:txt|md))?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_side_file(name: str) -> bool:
    """Return whether a file in a checkpoint's top directory is carried over into the artifact."""
    return name in _NAMES or _PATTERNS.fullmatch(name) is not None
