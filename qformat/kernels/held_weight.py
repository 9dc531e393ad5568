"""A packed weight that stays for many products, with what a backend makes ready of it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qformat.kernels.packed_weight import PackedWeight

T = TypeVar("T")


class HeldWeight:
    """A weight, and what products with it prepared, by the dtype of x. A layer holds it as long as its weight is there.

    A decoded token multiplies with every weight once, so what depends on the weight alone must not be done each time.
    """

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight
        self._prepared: dict[torch.dtype, Any] = {}

    def prepared(self, dtype: torch.dtype, prepare: Callable[[PackedWeight, torch.dtype], T]) -> T:
        """Return what `prepare` makes of the weight for x of `dtype`: made at the first call, kept for the others."""
        kept: T | None = self._prepared.get(dtype)
        if kept is None:
            kept = self._prepared[dtype] = prepare(self.weight, dtype)
        return kept
