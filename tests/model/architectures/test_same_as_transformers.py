"""A model of `load_checkpoint` has the tensors, dtypes and logits that transformers gives for the same files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qformat.model.checkpoint import load_checkpoint
from tests.converters.rules.built_types import BUILD_ERRORS
from tests.model.architectures.tiny_types import N_TOKENS, tiny_model

IDS = torch.arange(16)[None] % N_TOKENS

FEW = ("llama", "gemma3_text", "deepseek_v3", "gpt_neox", "gpt2", "mamba2", "qwen3_5_text", "flint")
"""Tied and untied heads, tensors that stay in float32, buffers in the files, names that are changed."""

OTHER_SHAPES = {"marian"}
"""Types whose tied weights have different shapes by default."""


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def differences(ours: Any, theirs: Any) -> Iterator[str]:
    """Yield what differs between two models of the same files."""
    states = ours.state_dict(), theirs.state_dict()
    yield from (f"only one has {name}" for name in states[0].keys() ^ states[1].keys())
    held = dict(ours.named_buffers()), dict(theirs.named_buffers())
    yield from (f"only one has the buffer {name}" for name in held[0].keys() ^ held[1].keys())
    for mine, other in (states, held):
        for name in mine.keys() & other.keys():
            if not same(mine[name], other[name]):
                yield f"{name}: {mine[name].dtype} and {other[name].dtype}, or other values"
    if ours.all_tied_weights_keys != theirs.all_tied_weights_keys:
        yield "other weights are tied"
    expected = logits(theirs)
    if expected is not None and not same(logits(ours), expected):  # type: ignore[arg-type]
        yield "other logits"


def logits(model: Any) -> Tensor | None:
    """Return the logits, or None if the model needs more than token ids."""
    try:
        with torch.no_grad():
            found = model(input_ids=IDS, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError):
        return None
    assert isinstance(found, Tensor)
    return found


class Head(StrEnum):
    """What the files of a model with tied weights have."""

    ABSENT = "the embedding, as transformers saves it"
    OWN = "a head with other values than the embedding"
    EQUAL = "a head with the values of the embedding"
    ALONE = "the head without the embedding"


def compared(name: str, folder: Path, head: Head = Head.ABSENT) -> list[str] | None:
    """Return the differences for a model of a type, or None if transformers has no such small model."""
    model = tiny_model(name)
    if model is None or (head is not Head.ABSENT and (name in OTHER_SHAPES or not model.all_tied_weights_keys)):
        return None
    try:
        model.save_pretrained(folder)
        if head is not Head.ABSENT:
            with_head(folder / "model.safetensors", head, model.all_tied_weights_keys)
        theirs = type(model).from_pretrained(folder, dtype="auto").eval()
    except BUILD_ERRORS:  # a config that transformers does not write or read back
        return None
    return [f"{name}: {text}" for text in differences(load_checkpoint(folder, device="cpu"), theirs)]


def with_head(file: Path, head: Head, tied: Mapping[str, str]) -> None:
    tensors = load_file(file)
    for number, (target, source) in enumerate(tied.items()):
        if source in tensors:
            own = torch.randn(tensors[source].shape, generator=torch.Generator().manual_seed(number))
            tensors[target] = own.to(torch.bfloat16) if head is Head.OWN else tensors[source].clone()
    if head is Head.ALONE:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in tied.values()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", FEW)
def test_a_model_of_a_few_types_is_the_same(name: str, tmp_path: Path) -> None:
    assert compared(name, tmp_path) == []


@pytest.mark.parametrize("head", [Head.OWN, Head.EQUAL, Head.ALONE])
@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "opt"])
def test_weights_are_tied_as_transformers_ties_them(name: str, head: Head, tmp_path: Path) -> None:
    assert compared(name, tmp_path, head) == []


@pytest.mark.slow
@pytest.mark.parametrize("head", [Head.OWN, Head.EQUAL, Head.ALONE])
def test_weights_of_every_type_are_tied_as_transformers_ties_them(head: Head, tmp_path: Path) -> None:
    found = {name: compared(name, tmp_path / name, head) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    tied = {name: texts for name, texts in found.items() if texts is not None}
    assert len(tied) > 40
    assert "\n".join(text for texts in tied.values() for text in texts) == ""


@pytest.mark.slow
def test_a_model_of_every_type_is_the_same(tmp_path: Path) -> None:
    found = {name: compared(name, tmp_path / name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    built = {name: texts for name, texts in found.items() if texts is not None}
    assert len(built) > 150
    assert "\n".join(text for texts in built.values() for text in texts) == ""
