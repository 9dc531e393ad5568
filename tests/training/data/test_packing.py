"""Packed rows: each example once, no row too long, no more rows than trl, and no attention across examples."""

from __future__ import annotations

import copy

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from trl.data_utils import pack_dataset

from qformat.errors import UsageError
from qformat.training.data.collate import PackedCollator, PaddedCollator
from qformat.training.data.packing import pack
from qformat.training.data.tokenised_data import IGNORED, Example
from tests.rounding import rounds_like


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200))
def test_every_example_is_in_exactly_one_row_and_fits(lengths: list[int]) -> None:
    bins = pack(np.array(lengths, np.int64), 50)
    rows = [bins[row].tolist() for row in range(len(bins))]
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in row) <= 50 for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_there_are_no_more_rows_than_with_trl(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 128, 300)
    rows = {"input_ids": [[1] * int(length) for length in lengths]}
    theirs = pack_dataset(datasets.Dataset.from_dict(rows), seq_length=128, strategy="bfd")
    assert len(pack(lengths, 128)) <= len(theirs)


def test_an_example_longer_than_a_row_is_rejected() -> None:
    with pytest.raises(UsageError, match="has 51 tokens, more than the 50 that a packed row holds"):
        pack(np.array([51]), 50)


def example(*lengths: int, seed: int = 0) -> Example:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (sum(lengths),), generator=random)
    labels = ids.clone()
    start = 0
    for length in lengths:
        labels[start] = IGNORED
        start += length
    return Example(input_ids=ids, labels=labels, seq_lengths=list(lengths))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_give_the_same_logits_as_single_ones(attention: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).eval()
    exact = copy.deepcopy(model).double()
    rows = [example(5, 9), example(7, seed=1), example(3, 1, 4, seed=2)]
    batch = PackedCollator()(rows)
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        start = 0
        for row in rows:
            offset = 0
            for length in row["seq_lengths"]:
                ids = row["input_ids"][None, offset : offset + length]
                alone, precisely = (m(ids, use_cache=False).logits[0] for m in (model, exact))
                assert rounds_like(packed[start : start + length], alone, precisely)
                offset, start = offset + length, start + length
        other = [rows[0], example(7, seed=9), rows[2]]
        changed = model(**{k: v for k, v in PackedCollator()(other).items() if k != "labels"}).logits[0]
    assert torch.equal(changed[:14], packed[:14])
    assert torch.equal(changed[21:], packed[21:])


def test_no_label_crosses_a_boundary() -> None:
    batch = PackedCollator()([example(5, 9), example(7, seed=1)])
    labels, positions = batch["labels"], batch["position_ids"]
    assert isinstance(labels, torch.Tensor)
    assert isinstance(positions, torch.Tensor)
    assert bool((labels[positions == 0] == IGNORED).all())
    assert positions[0].tolist() == [*range(5), *range(9), *range(7)]


def test_padding_is_neither_attended_to_nor_trained() -> None:
    batch = PaddedCollator(pad_id=7)([example(5), example(3, seed=1)])
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]  # type: ignore[union-attr]
    assert batch["input_ids"][1, 3:].tolist() == [7, 7]  # type: ignore[index]
    assert batch["labels"][1, 3:].tolist() == [IGNORED, IGNORED]  # type: ignore[index]
