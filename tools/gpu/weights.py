"""Random 4-bit weights as torch tensors, with the decoded values of the reference, for every kernel test."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qformat.codec import nested, nf4
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.floats import FloatFormat, narrow
from qformat.kernels.packed_weight import PackedWeight

FORMATS = {torch.bfloat16: FloatFormat.BF16, torch.float16: FloatFormat.F16, torch.float32: FloatFormat.F32}


def random_weight(
    shape: tuple[int, int], *, block_size: int = 64, double_quant: bool = True, seed: int = 0, device: str = "cpu"
) -> PackedWeight:
    """Return a weight with random codes and scales; some scales are negative or zero."""
    generator = np.random.default_rng([seed, *shape, block_size, double_quant])
    n = shape[0] * shape[1]
    n_blocks = nf4.block_count(n, block_size)
    packed = generator.integers(0, 256, nf4.packed_nbytes(n), dtype=np.uint8)

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array.copy()).to(device)

    if not double_quant:
        absmax = generator.standard_normal(n_blocks).astype(np.float32)
        absmax[::7] = 0
        return PackedWeight(tensor(packed), tensor(absmax), None, None, 0.0, block_size, shape)
    codes = generator.integers(0, 256, n_blocks, dtype=np.uint8)
    nested_absmax = generator.random(nf4.block_count(n_blocks, nested.NESTED_BLOCK_SIZE)).astype(np.float32) * 0.05
    offset = float(np.float32(0.0371))
    return PackedWeight(
        tensor(packed), tensor(codes), tensor(nested_absmax.astype(np.float32)), tensor(DYNAMIC_MAP), offset,
        block_size, shape,
    )  # fmt: skip


def reference_bits(weight: PackedWeight, dtype: torch.dtype) -> NDArray[np.generic]:
    """Return the bits of a weight that the reference decodes and rounds to `dtype`: uint16 or uint32 [N, K]."""
    absmax = weight.absmax.cpu().numpy()
    if weight.nested_absmax is not None and weight.nested_quant_map is not None:
        absmax = nested.decode_absmax(
            absmax, weight.nested_absmax.cpu().numpy(), np.float32(weight.nested_offset),
            nested_quant_map=weight.nested_quant_map.cpu().numpy(),
        )  # fmt: skip
    values = nf4.decode(weight.packed.cpu().numpy(), absmax, n_elements=weight.n_elements, block_size=weight.block_size)
    raw = narrow(values, FORMATS[dtype])
    return (raw.view(np.uint32) if dtype == torch.float32 else raw).reshape(weight.shape)


def bits(tensor: Tensor) -> NDArray[np.generic]:
    """Return the bits of a tensor as uint16 or uint32, in the tensor's shape."""
    if tensor.dtype == torch.float32:
        return tensor.cpu().numpy().view(np.uint32)
    return tensor.cpu().view(torch.int16).numpy().view(np.uint16)


def random_codes(n: int) -> Tensor:
    """Return n random codes, packed."""
    codes = np.random.default_rng(n).integers(0, 256, nf4.packed_nbytes(n), dtype=np.uint8)
    return torch.from_numpy(codes)


def exact_block_dots(values: Tensor, packed: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the sum of values [n] times codebook entries over each block in float64, and the sum of magnitudes."""
    n = values.numel()
    ones = np.ones(nf4.block_count(n, block_size), np.float32)
    factors = nf4.decode(packed.cpu().numpy(), ones, n_elements=n, block_size=block_size)
    products = np.zeros(ones.size * block_size)
    products[:n] = values.double().cpu().numpy() * factors
    blocks = products.reshape(-1, block_size)
    return torch.from_numpy(blocks.sum(1)), torch.from_numpy(np.abs(blocks).sum(1))
