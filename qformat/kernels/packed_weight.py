"""One 4-bit weight as torch tensors, the input of every kernel (spec sections 4 and 5).

The weight [rows, columns] is flattened in row-major order to n elements; block b has the elements from b * block_size.

    packed         uint8     [ c0 c1 ][ c2 c3 ][ c4 c5 ] ...           two codes per byte, the first in the high nibble
    absmax         uint8     [ block 0 ][ block 1 ][ block 2 ] ...     one code per block
    nested_absmax  float32   [ blocks 0-255 ][ blocks 256-511 ] ...    one per 256 blocks

    scale[b] = nested_quant_map[absmax[b]] * nested_absmax[b // 256] + nested_offset
    w[j]     = codebook[code[j]] * scale[j // block_size]

Without double quantization, absmax is float32 and holds scale[b] itself.
"""

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
    """Components of one packed weight on one device. They are checked against each other on creation.

    Attributes:
        packed: uint8 [ceil(n / 2)], two codes per byte, the first in the high nibble.
        absmax: uint8 [n_blocks] with double quantization, float32 [n_blocks] without.
        nested_absmax: float32 [ceil(n_blocks / 256)], or None without double quantization.
        nested_quant_map: float32 [256], or None without double quantization.
        nested_offset: A float32 value, 0.0 without double quantization. As a Python float it is passed as a kernel
            argument: a launch reads nothing back from the device and can be captured in a CUDA graph.
        block_size: Number of elements per block.
        shape: (rows, columns) of the weight; n = rows * columns.
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
            raise UsageError(f"block_size: found {self.block_size!r}, expected one of {BLOCK_SIZES}")
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise UsageError(f"shape: found {self.shape!r}, expected (rows, columns)")
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
            raise UsageError("nested_absmax and nested_quant_map: pass both or neither")

    @property
    def n_elements(self) -> int:
        """Number of elements in the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def n_blocks(self) -> int:
        """Number of blocks; the last one may be partial."""
        return block_count(self.n_elements, self.block_size)

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are themselves quantized."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Device of all components."""
        return self.packed.device

    def bands(self, max_elements: int) -> list[tuple[int, int]]:
        """Return ranges of rows (first, last + 1) with at most `max_elements` elements each.

        All ranges except the last end at the end of a block. If blocks rarely end at the end of a row, a range may have
        more elements.
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
                f"{name}: found {layout} {tensor.dtype} with {tensor.numel()} entries, expected contiguous {dtype} "
                f"with {n} (shape {self.shape[0]}x{self.shape[1]}, block size {self.block_size})"
            )
        if tensor.device != self.packed.device:
            raise UsageError(f"{name}: is on {tensor.device}, but packed is on {self.packed.device}")
