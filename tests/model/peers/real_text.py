"""Real text that is part of every Python installation: the reference pages of `help()`."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch
from torch import Tensor

from qformat.model.load import load_tokenizer


def windows(artifact: Path, *, count: int, size: int) -> list[Tensor]:
    """Return the first tokens of the text, with the artifact's tokenizer, as `count` batches [1, size]."""
    pages = pydoc_data.topics.topics
    text = "\n".join(pages[name] for name in sorted(pages))[: 10 * count * size]
    ids = load_tokenizer(artifact)(text, return_tensors="pt")["input_ids"][0, : count * size]
    assert ids.numel() == count * size
    return list(torch.split(ids[None], size, dim=1))
