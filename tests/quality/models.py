"""A random Llama with a tokenizer, its artifacts, and a text: all tiny."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from qformat.converters.convert import ConversionOptions, convert
from tests.small_models import Tensor, llama_config, llama_tensors, tensor_of, weight, write_checkpoint
from tests.training import runs

SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 128, "vocabulary": runs.VOCABULARY}


def tensors(*, seed: int = 0, vocabulary: int = runs.VOCABULARY) -> dict[str, Tensor]:
    """Return a Llama whose output depends on its input: norms of 1, and logits some units apart."""
    found = llama_tensors(**{**SIZES, "vocabulary": vocabulary}, seed=seed)
    norms = {name: tensor_of(np.ones(tensor.shape), "BF16") for name, tensor in found.items() if "norm" in name}
    return {**found, **norms, "lm_head.weight": weight((vocabulary, SIZES["hidden"]), scale=0.4, seed=seed + 99)}


def write_source(folder: Path, *, seed: int = 0, vocabulary: int = runs.VOCABULARY) -> Path:
    config = {**llama_config(**{**SIZES, "vocabulary": vocabulary}), "max_position_embeddings": 128}
    write_checkpoint(folder, tensors(seed=seed, vocabulary=vocabulary), config=config)
    runs.small_tokenizer().save_pretrained(folder)
    return folder


def write_artifact(source: Path, out: Path, **options: Any) -> Path:
    convert(source, out, ConversionOptions(**options))
    return out


def write_text(path: Path, *, n_words: int = 2000, seed: int = 0) -> Path:
    path.write_text(" ".join(random.Random(seed).choices(runs.WORDS, k=n_words)))
    return path
