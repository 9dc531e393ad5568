"""Rows as a batch: padded to the longest, or one after the other without padding.

The first token of an example has no label in either (`tokenise`), so that no prediction crosses the boundary of
neighbours, and a batch has as many labels as it has predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from qformat.training.data.tokenised_data import IGNORED, Example

Batch = dict[str, torch.Tensor | int]


@dataclass(frozen=True, slots=True)
class PaddedCollator:
    """Pads on the right. pad_id: any token; it is neither attended to nor trained on."""

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
    """Lays all examples of all rows one after the other. Attention ends where position_ids start again.

    There is no attention_mask: transformers finds the boundaries in position_ids only where none is given. The other
    entries say the same to the kernels of FlashAttention and of linear attention, as trl's collator does. use_cache is
    off, since with a cache, which transformers makes unless told otherwise, it does not look at position_ids either.
    """

    def __call__(self, rows: list[Example]) -> Batch:
        """Return what `model(**batch)` takes, for n tokens.

        input_ids, labels, position_ids: int64 (1, n). seq_idx: int32 (1, n). cu_seq_lens_q and _k: int32.
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
