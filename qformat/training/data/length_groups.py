"""The order of examples in batches of similar lengths: it depends on the seed and the epoch alone, so it resumes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class SeededLengthGroups(LengthGroupedSampler):
    """transformers' LengthGroupedSampler, which draws from the global generator, and so ends elsewhere when resumed."""

    def __init__(self, batch_size: int, lengths: NDArray[np.int64], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths.tolist())
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is for; accelerate's loader does."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the number of each example once."""
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = get_length_grouped_indices(  # type: ignore[no-untyped-call]
            self.lengths, self.batch_size, generator=generator
        )
        return iter(order)
