"""Interface between a conversion and a method that chooses the codes of weights, such as calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.packed_arrays import PackedArrays
from qformat.artifact.writing.staging import Staging


class StagedWeights(Protocol):
    """Access of a `WeightEncoder` to the output directory, the source and the weights that are already encoded."""

    @property
    def staging(self) -> Staging:
        """Unfinished output directory, with its journal and space for temporary files."""

    def read_source(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a source tensor."""

    def is_staged(self, name: str) -> bool:
        """Return whether a weight is already encoded and staged."""

    def read_encoded(self, name: str) -> PackedArrays:
        """Return the codes and scales of a staged weight."""


class WeightEncoder(Protocol):
    """Method that chooses the codes of some weights from more than their own values."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights that it encodes."""

    def encode(self, staged: StagedWeights) -> Iterator[tuple[str, PackedArrays]]:
        """Yield each of its weights that is not staged yet, in any order.

        The conversion stages all other tensors before the first one, and each weight before it requests the next.
        """
