"""Quantize weights in memory with other 4-bit codebooks, for comparison.

The scale of a block is its largest magnitude. Double quantization of the scales is that of the format.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qformat.codec.codebooks import NF4_CODEBOOK
from qformat.codec.nested import decode_absmax, encode_absmax

# FP4 of bitsandbytes: a sign, two bits of exponent and one of mantissa, divided by the largest value.
_FP4 = np.array([0.0, 0.0052083334885537624, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0])

CODEBOOKS: dict[str, NDArray[np.float32]] = {
    "FP4": np.concatenate([-_FP4[:0:-1], _FP4]).astype(np.float32),
    "Int4": (np.arange(-7, 8) / 7).astype(np.float32),
    "NF4": NF4_CODEBOOK,
}
"""Values of each codebook, ascending from -1 to 1. Int4 is symmetric: -7 to 7, divided by 7."""


def quantize_in_place(model: nn.Module, names: Iterable[str], codebook: str, block_size: int, *, nested: bool) -> None:
    """Replace the values of the weights `names` with their values after 4-bit quantization, in the same dtype."""
    for name in names:
        parameter = model.get_parameter(name)
        values = quantized(parameter.detach(), CODEBOOKS[codebook], block_size, nested=nested)
        parameter.data = values.to(parameter.dtype)


def quantized(weight: Tensor, codebook: NDArray[np.float32], block_size: int, *, nested: bool) -> Tensor:
    """Return the quantized values, float32, of a weight whose size is a multiple of the block size."""
    values = torch.tensor(codebook)
    thresholds = (values[1:] + values[:-1]) / 2
    blocks = weight.float().reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    codes = torch.bucketize(blocks * (1 / absmax.clamp_min(1e-38))[:, None], thresholds)
    if nested:
        second = encode_absmax(absmax.numpy())
        absmax = torch.from_numpy(decode_absmax(second.codes, second.nested_absmax, second.offset))
    return (values[codes] * absmax[:, None]).reshape(weight.shape)


def bits_per_weight(block_size: int, *, nested: bool) -> float:
    """Return the number of bits per weight for codes and scales."""
    return 4 + ((8 + 32 / 256) if nested else 32) / block_size
