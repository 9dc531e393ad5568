"""Collates rows into a batch: padded to the longest row, or concatenated without padding.

In both forms the first token of an example has no label (`tokenise`). No prediction therefore crosses the boundary
between neighbouring examples, and a batch has as many labels as predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from qformat.training.data.tokenised_data import IGNORED, Example

Batch = dict[str, torch.Tensor | int]


@dataclass(frozen=True, slots=True)
class PaddedCollator:
    """Pads rows on the right.

    Attributes:
        pad_id: Token to pad with. It is neither attended to nor trained, so any token will do.
    """

    pad_id: int

    def __call__(self, rows: list[Example]) -> Batch:
        """Return input_ids, labels and attention_mask: int64 (rows, longest)."""
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """Concatenates all examples of all rows. Each example attends only to itself, since its position_ids restart at 0.

    transformers derives the boundaries from position_ids only without an attention_mask and without a cache. The batch
    therefore has no attention_mask, and use_cache is False, because transformers makes a cache by default. The other
    entries give the boundaries to FlashAttention and linear attention kernels, as trl's collator does.
    """

    def __call__(self, rows: list[Example]) -> Batch:
        """Return the arguments of `model(**batch)` for n tokens.

        Returns:
            input_ids, labels and position_ids, int64 (1, n); seq_idx, int32 (1, n); cu_seq_lens_q and cu_seq_lens_k,
            int32 (n_examples + 1,); max_length_q and max_length_k, the length of the longest example; use_cache.
        """
        lengths = torch.tensor([length for row in rows for length in row["seq_lengths"]])
        ends = torch.cumsum(lengths, 0)
        starts = torch.repeat_interleave(ends - lengths, lengths)
        boundaries = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        number = torch.arange(len(lengths), dtype=torch.int32)
        return {
            "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
            "labels": torch.cat([row["labels"] for row in rows])[None],
            "position_ids": (torch.arange(len(starts)) - starts)[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": torch.repeat_interleave(number, lengths)[None],
            "use_cache": False,
        }
