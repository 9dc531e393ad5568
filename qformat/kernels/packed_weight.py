"""One 4-bit weight as torch tensors: what every kernel takes (spec sections 4 and 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import BLOCK_SIZES, block_count, packed_nbytes
from qformat.errors import UsageError


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The components of one packed tensor on one device, checked against each other when made.

    packed: uint8 [ceil(n/2)], two codes a byte, the first in the high nibble
    absmax: uint8 [n_blocks] codes of the second level, or float32 [n_blocks] without it
    nested_absmax: float32 [ceil(n_blocks/256)], or None
    nested_quant_map: float32 [256], or None
    nested_offset: a float32 value, 0.0 without the second level. A Python float: it travels as a kernel argument, so a
        launch reads nothing back from the device and can be captured in a graph
    block_size: elements that share an absmax
    shape: (rows, columns) of the weight, n = rows * columns
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    nested_offset: float
    block_size: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(f"block_size: {self.block_size!r}, expected one of {BLOCK_SIZES}")
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise UsageError(f"shape: {self.shape!r}, expected (rows, columns)")
        self._check("packed", self.packed, torch.uint8, packed_nbytes(self.n_elements))
        nested = (self.nested_absmax, self.nested_quant_map)
        if self.nested_absmax is not None and self.nested_quant_map is not None:
            self._check("absmax", self.absmax, torch.uint8, self.n_blocks)
            n_nested = block_count(self.n_blocks, NESTED_BLOCK_SIZE)
            self._check("nested_absmax", self.nested_absmax, torch.float32, n_nested)
            self._check("nested_quant_map", self.nested_quant_map, torch.float32, 256)
        elif nested == (None, None):
            self._check("absmax", self.absmax, torch.float32, self.n_blocks)
        else:
            raise UsageError("nested_absmax and nested_quant_map: one is None and the other is not")

    @property
    def n_elements(self) -> int:
        """Weights in the tensor."""
        return self.shape[0] * self.shape[1]

    @property
    def n_blocks(self) -> int:
        """Blocks that cover the tensor; the last one may be partial."""
        return block_count(self.n_elements, self.block_size)

    @property
    def double_quant(self) -> bool:
        """Whether absmax holds codes of the second level."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """The device of every component."""
        return self.packed.device

    def bands(self, max_elements: int) -> list[tuple[int, int]]:
        """Return ranges of rows of at most that many elements that, but for the last, end at the end of a block.

        Where no row ends a block for long, a range is as long as it must be.
        """
        n, k = self.shape
        if self.n_elements <= max_elements:
            return [(0, n)]
        step = math.lcm(self.block_size, k) // k  # the fewest rows that hold whole blocks
        rows = max(step, max_elements // k // step * step)
        return [(first, min(first + rows, n)) for first in range(0, n, rows)]

    def _check(self, name: str, tensor: Tensor, dtype: torch.dtype, n: int) -> None:
        if tensor.dtype != dtype or tensor.numel() != n or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "strided"
            raise UsageError(
                f"{name}: {layout} {tensor.dtype} with {tensor.numel()} entries, expected contiguous {dtype} with {n} "
                f"(shape {self.shape[0]}x{self.shape[1]}, block {self.block_size})"
            )
        if tensor.device != self.packed.device:
            raise UsageError(f"{name}: on {tensor.device}, but packed is on {self.packed.device}")
