"""A packed weight that is used for many products, with the data that a backend prepares from it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qformat.kernels.packed_weight import PackedWeight

T = TypeVar("T")


class HeldWeight:
    """A weight with the data that products prepare from it, by dtype of x. A layer keeps it as long as its weight.

    Generating a token multiplies with every weight once, so work that depends only on the weight is done only once.

    Attributes:
        weight: The packed weight.
    """

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight
        self._prepared: dict[torch.dtype, Any] = {}

    def prepared(self, dtype: torch.dtype, prepare: Callable[[PackedWeight, torch.dtype], T]) -> T:
        """Return the prepared data for x of `dtype`. The first call prepares it, later calls return the same object.

        Args:
            dtype: Dtype of x.
            prepare: Function that prepares the data from the weight and the dtype.
        """
        kept: T | None = self._prepared.get(dtype)
        if kept is None:
            kept = self._prepared[dtype] = prepare(self.weight, dtype)
        return kept
