"""Storage formats of a moment: floating-point values, or blocks of 8-bit codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qformat.training.optimizer.page_layout import BLOCK_NBYTES, BLOCK_SIZE, FLOAT_UNIT_NBYTES


@dataclass(frozen=True, slots=True)
class FloatStates:
    """Floating-point values in the memory order of the parameter.

    Attributes:
        dtype: Dtype of the values.
    """

    dtype: torch.dtype

    @property
    def unit_size(self) -> int:
        """Number of elements per unit."""
        return FLOAT_UNIT_NBYTES // self.dtype.itemsize

    @property
    def unit_nbytes(self) -> int:
        """Size of a unit in bytes."""
        return FLOAT_UNIT_NBYTES

    def view(self, data: Tensor, size: int) -> Tensor:
        """Return the bytes of a moment as values.

        Args:
            data: Bytes of the moment, uint8 [n].
            size: Number of elements.

        Returns:
            A view [size] of the dtype.
        """
        return data[: size * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True, slots=True)
class BlockStates:
    """Blocks of 256 uint8 codes, each followed by its absmax in float32. The last block is padded."""

    @property
    def unit_size(self) -> int:
        """Number of elements per unit."""
        return BLOCK_SIZE

    @property
    def unit_nbytes(self) -> int:
        """Size of a unit in bytes."""
        return BLOCK_NBYTES

    def view(self, data: Tensor, size: int) -> Tensor:
        """Return the bytes of a moment as blocks.

        Args:
            data: Bytes of the moment, uint8 [n].
            size: Number of elements.

        Returns:
            A view uint8 [n_blocks, 260].
        """
        n_blocks = -(-size // BLOCK_SIZE)
        return data[: n_blocks * BLOCK_NBYTES].view(n_blocks, BLOCK_NBYTES)


StateFormat = FloatStates | BlockStates
