"""Dequantization in plain torch operations: for devices that neither numba nor Triton runs on. Same bits, slow."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qformat.codec.codebooks import NF4_CODEBOOK
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.kernels.packed_weight import PackedWeight


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Decode a weight into `out` [N, K], bf16, fp16 or fp32, on the same device."""
    n = weight.n_elements
    codes = torch.stack((weight.packed.flatten() >> 4, weight.packed.flatten() & 15), dim=1).flatten()[:n]
    scales = _scales(weight).repeat_interleave(weight.block_size)[:n]
    out.copy_((_codebook(weight.device)[codes.int()] * scales).view(weight.shape))


def _scales(weight: PackedWeight) -> Tensor:
    if weight.nested_absmax is None or weight.nested_quant_map is None:
        return weight.absmax
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: weight.n_blocks]
    return weight.nested_quant_map[weight.absmax.int()] * nested + weight.nested_offset


@cache
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODEBOOK.tolist(), dtype=torch.float32, device=device)
