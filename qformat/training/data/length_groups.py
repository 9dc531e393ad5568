"""Groups examples of similar length. The order depends only on the seed and the epoch, so a training can resume it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class SeededLengthGroups(LengthGroupedSampler):
    """A LengthGroupedSampler of transformers with a seed of its own.

    The original draws from the global random generator, so a resumed training would get another order.

    Args:
        batch_size: Number of examples that are processed together.
        lengths: Number of tokens in each example, int64 (n,).
        seed: Seed of the order.
    """

    def __init__(self, batch_size: int, lengths: NDArray[np.int64], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths.tolist())
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. accelerate's data loader calls this."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the number of each example once."""
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = get_length_grouped_indices(  # type: ignore[no-untyped-call]
            self.lengths, self.batch_size, generator=generator
        )
        return iter(order)
