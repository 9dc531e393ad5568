"""The operations in plain torch, for devices on which neither numba nor Triton runs. Bit-identical but slow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.kernels.device_codebook import device_codebook
from qformat.kernels.packed_weight import PackedWeight


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Decode a weight.

    Args:
        weight: Weight [N, K] to decode.
        out: Tensor for the result, [N, K], on the same device, in bf16, fp16 or fp32.
    """
    n = weight.n_elements
    scales = _scales(weight).repeat_interleave(weight.block_size)[:n]
    out.copy_((_values(weight.packed, n) * scales).view(weight.shape))


def block_dots(values: Tensor, packed: Tensor, block_size: int, out: Tensor) -> None:
    """Sum values times codebook entries over each block: out[b] = sum over block b of values[j] * codebook[code[j]].

    Args:
        values: Values [n].
        packed: Packed codes, uint8 [ceil(n / 2)].
        block_size: Number of elements per block.
        out: Tensor for the sums, float32 [n_blocks].
    """
    products = _values(packed, values.numel()) * values.float()
    padding = out.numel() * block_size - products.numel()
    torch.sum(functional.pad(products, (0, padding)).view(-1, block_size), dim=1, out=out)


def _values(packed: Tensor, n: int) -> Tensor:
    """Return the codebook entries of n codes, float32 [n]."""
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()[:n]
    return device_codebook(packed.device)[codes.int()]


def _scales(weight: PackedWeight) -> Tensor:
    if weight.nested_absmax is None or weight.nested_quant_map is None:
        return weight.absmax
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: weight.n_blocks]
    return weight.nested_quant_map[weight.absmax.int()] * nested + weight.nested_offset
