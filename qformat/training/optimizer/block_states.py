"""Encodes and decodes moments in blocks of 8-bit codes.

A block is 260 bytes, uint8 [n_blocks, 260] for a moment:

    ┌──────────────────────────────────────────┬────────────┐
    │ 256 codes, uint8, one for each element   │ absmax f32 │      value[i] = map[code[i]] * absmax
    └──────────────────────────────────────────┴────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qformat.training.optimizer.dynamic_map import decoding_table, encoding_table
from qformat.training.optimizer.page_layout import BLOCK_SIZE

SMALLEST_ABSMAX = torch.finfo(torch.float32).tiny
"""Smallest divisor of a block, so that a block of zeros stays a block of zeros."""


def codes_of(blocks: Tensor) -> Tensor:
    """Return the codes of blocks, uint8 [n, 260], as a view uint8 [n, 256]."""
    return blocks[:, :BLOCK_SIZE]


def absmax_of(blocks: Tensor) -> Tensor:
    """Return the absmax values of blocks, uint8 [n, 260], as a view float32 [n, 1]."""
    return blocks[:, BLOCK_SIZE:].view(torch.float32)


def decode_blocks(blocks: Tensor, out: Tensor, indices: Tensor, *, signed: bool) -> None:
    """Decode blocks: map[code] * absmax.

    Args:
        blocks: Blocks to decode, uint8 [n, 260].
        out: Receives the values, float32 [n, 256].
        indices: Temporary memory, int32 [n, 256].
        signed: Whether the blocks hold a first moment (signed map) or a second moment (unsigned map).
    """
    indices.copy_(codes_of(blocks))
    torch.index_select(decoding_table(out.device, signed=signed), 0, indices.view(-1), out=out.view(-1))
    out.mul_(absmax_of(blocks))


def encode_blocks(values: Tensor, blocks: Tensor, scratch: EncodingScratch, *, signed: bool) -> None:
    """Encode blocks: the code is that of the map's value nearest to value / absmax.

    A positive second moment never becomes zero. NaN or Inf makes the whole block NaN, because 32-bit states would keep
    such values as well.

    Args:
        values: Values to encode, float32 [n, 256].
        blocks: Receives the blocks, uint8 [n, 260]. Written after all other operations.
        scratch: Temporary memory for at least n blocks.
        signed: Whether the values are a first moment (signed map) or a second moment (unsigned map).
    """
    n = values.shape[0]
    ratios, borders = scratch.ratios[:n], scratch.borders[:n]
    indices, codes = scratch.indices[:n], scratch.codes[:n]
    lower_codes, upper_borders = encoding_table(values.device, signed=signed)
    torch.abs(values, out=ratios)
    torch.amax(ratios, dim=1, keepdim=True, out=scratch.absmax[:n])
    torch.clamp(scratch.absmax[:n], min=SMALLEST_ABSMAX, out=scratch.divisors[:n])
    torch.div(values, scratch.divisors[:n], out=ratios)
    torch.bitwise_right_shift(ratios.view(torch.int32), 16, out=indices)
    indices.bitwise_and_(0xFFFF)
    torch.index_select(upper_borders, 0, indices.view(-1), out=borders.view(-1))
    torch.index_select(lower_codes, 0, indices.view(-1), out=codes.view(-1))
    torch.gt(ratios, borders, out=indices)
    codes.add_(indices)
    codes_of(blocks).copy_(codes)
    absmax_of(blocks).copy_(scratch.absmax[:n])


@dataclass(frozen=True, slots=True)
class EncodingScratch:
    """Temporary memory to encode up to n blocks.

    Attributes:
        ratios: Values divided by the absmax of their block, float32 [n, 256].
        borders: Upper border of the candidate code of each ratio, float32 [n, 256].
        indices: Upper 16 bits of each ratio, then whether it is above its border, int32 [n, 256].
        codes: Codes, int32 [n, 256].
        absmax: Largest absolute value of each block, float32 [n, 1].
        divisors: The same, at least `SMALLEST_ABSMAX`, float32 [n, 1].
    """

    ratios: Tensor
    borders: Tensor
    indices: Tensor
    codes: Tensor
    absmax: Tensor
    divisors: Tensor

    @staticmethod
    def nbytes(n_blocks: int) -> int:
        """Return the bytes that `take` needs for a number of blocks."""
        return n_blocks * 4 * (4 * BLOCK_SIZE + 2)

    @classmethod
    def take(cls, memory: Tensor, n_blocks: int) -> EncodingScratch:
        """Divide a piece of memory into the arrays.

        Args:
            memory: Memory to use, uint8 [at least nbytes(n_blocks)].
            n_blocks: Largest number of blocks to encode at a time.

        Returns:
            The arrays, as views of the memory.
        """
        sizes = [4 * BLOCK_SIZE * n_blocks] * 4 + [4 * n_blocks] * 2
        parts = torch.split(memory[: sum(sizes)], sizes)
        dtypes = [torch.float32, torch.float32, torch.int32, torch.int32, torch.float32, torch.float32]
        return cls(*(part.view(dtype).view(n_blocks, -1) for part, dtype in zip(parts, dtypes, strict=True)))
