"""Where a conversion hands the choice of codes to somebody else: what it offers, and what it expects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.packed_arrays import PackedArrays
from qformat.artifact.writing.staging import Staging


class StagedWeights(Protocol):
    """What an `WeightEncoder` is offered: the folder in the making, the source, and what is encoded already."""

    @property
    def staging(self) -> Staging:
        """The folder in the making: its journal, and room beside it."""

    def read_source(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor of the source."""

    def is_staged(self, name: str) -> bool:
        """Whether a weight is encoded and staged already."""

    def read_encoded(self, name: str) -> PackedArrays:
        """Return a weight that is staged."""


class WeightEncoder(Protocol):
    """Chooses the codes of some weights otherwise than one by one from their own values."""

    @property
    def names(self) -> frozenset[str]:
        """The weights that it encodes."""

    def encode(self, staged: StagedWeights) -> Iterator[tuple[str, PackedArrays]]:
        """Yield each of its weights that is not staged, in its own order; each is staged before the next is asked for.

        All other tensors of the plan are staged before the first one.
        """
