"""Moments in blocks of 8-bit codes: decode to float32, encode back. Block: 256 codes, then absmax as float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qformat.training.optimizer.dynamic_map import decoding_table, encoding_table
from qformat.training.optimizer.page_layout import BLOCK_SIZE

SMALLEST_ABSMAX = torch.finfo(torch.float32).tiny
"""Blocks are divided by no less than this: a block of zeros stays one."""


def codes_of(blocks: Tensor) -> Tensor:
    """Return the codes of blocks uint8 [n, 260] as uint8 [n, 256], in the same memory."""
    return blocks[:, :BLOCK_SIZE]


def absmax_of(blocks: Tensor) -> Tensor:
    """Return the scales of blocks uint8 [n, 260] as float32 [n, 1], in the same memory."""
    return blocks[:, BLOCK_SIZE:].view(torch.float32)


def decode_blocks(blocks: Tensor, out: Tensor, indices: Tensor, *, signed: bool) -> None:
    """Decode uint8 [n, 260] to float32 `out` [n, 256]: map[code] * absmax. `indices`, int32 [n, 256], is scratch."""
    indices.copy_(codes_of(blocks))
    torch.index_select(decoding_table(out.device, signed=signed), 0, indices.view(-1), out=out.view(-1))
    out.mul_(absmax_of(blocks))


def encode_blocks(values: Tensor, blocks: Tensor, scratch: EncodingScratch, *, signed: bool) -> None:
    """Encode float32 `values` [n, 256] into uint8 `blocks` [n, 260], which are written at the end.

    The code is that of the value of the map nearest to value / absmax; a positive second moment never becomes zero.
    A NaN makes the block NaN, and so does an infinity, as 32-bit states would carry them on.
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
    """Memory that encoding works in, for as many blocks as the arrays have rows."""

    ratios: Tensor
    """float32 [n, 256]"""
    borders: Tensor
    """float32 [n, 256]"""
    indices: Tensor
    """int32 [n, 256]"""
    codes: Tensor
    """int32 [n, 256]"""
    absmax: Tensor
    """float32 [n, 1]"""
    divisors: Tensor
    """float32 [n, 1]"""

    @staticmethod
    def nbytes(n_blocks: int) -> int:
        """Return how much memory `take` needs."""
        return n_blocks * 4 * (4 * BLOCK_SIZE + 2)

    @classmethod
    def take(cls, memory: Tensor, n_blocks: int) -> EncodingScratch:
        """Lay the arrays out in uint8 [at least nbytes(n_blocks)]."""
        sizes = [4 * BLOCK_SIZE * n_blocks] * 4 + [4 * n_blocks] * 2
        parts = torch.split(memory[: sum(sizes)], sizes)
        dtypes = [torch.float32, torch.float32, torch.int32, torch.int32, torch.float32, torch.float32]
        return cls(*(part.view(dtype).view(n_blocks, -1) for part, dtype in zip(parts, dtypes, strict=True)))
