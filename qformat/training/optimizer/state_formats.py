"""How a moment of a parameter is stored in its span of bytes: floats as they are, or blocks of 8-bit codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qformat.training.optimizer.page_layout import BLOCK_NBYTES, BLOCK_SIZE, FLOAT_UNIT_NBYTES


@dataclass(frozen=True, slots=True)
class FloatStates:
    """Elements in the memory order of the parameter."""

    dtype: torch.dtype

    @property
    def unit_size(self) -> int:
        """Elements in a unit."""
        return FLOAT_UNIT_NBYTES // self.dtype.itemsize

    @property
    def unit_nbytes(self) -> int:
        """Bytes of a unit."""
        return FLOAT_UNIT_NBYTES

    def view(self, data: Tensor, size: int) -> Tensor:
        """Return the first `size` elements of uint8 [n] as [size] of the dtype, in the same memory."""
        return data[: size * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True, slots=True)
class BlockStates:
    """Blocks of 256 codes, uint8, each followed by its absmax, float32. The last block is filled up."""

    @property
    def unit_size(self) -> int:
        """Elements in a unit."""
        return BLOCK_SIZE

    @property
    def unit_nbytes(self) -> int:
        """Bytes of a unit."""
        return BLOCK_NBYTES

    def view(self, data: Tensor, size: int) -> Tensor:
        """Return the blocks of `size` elements in uint8 [n] as uint8 [n_blocks, 260], in the same memory."""
        n_blocks = -(-size // BLOCK_SIZE)
        return data[: n_blocks * BLOCK_NBYTES].view(n_blocks, BLOCK_NBYTES)


StateFormat = FloatStates | BlockStates
