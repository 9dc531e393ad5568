"""Sums over blocks on a GPU: the last step of the gradient of the scales, in one launch over a chunk of the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.errors import UsageError
from qformat.kernels.device_codebook import device_codebook
from qformat.kernels.triton.launch import check_aligned, check_tensors, is_aligned, on_device

N_WARPS = 4
ROUNDS = 4
"""Words of codes that a lane takes. Their 64 bytes of values are in flight together."""

TILE = N_WARPS * 32 * ROUNDS * 8
"""Values that a program sums: whole blocks of every size."""

OPTIONS: dict[str, Any] = {"num_warps": N_WARPS, "enable_fp_fusion": True}
"""Of the compiler. These sums equal no reference bit for bit: a fused multiply-add only rounds less."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def constants(block_size: int, *, aligned: bool) -> dict[str, Any]:
    """Return the kernel's compile-time arguments: the launch and `tools/gpu/kernel_cases.py` use the same."""
    return {"BLOCK_SIZE": block_size, "ALIGNED": aligned, "LANES": N_WARPS * 32, "ROUNDS": ROUNDS}


def block_dots(values: Tensor, packed: Tensor, block_size: int, out: Tensor) -> None:
    """Fill out float32 [n_blocks] with the blocks' sums of values [n] times codebook[codes]; asynchronous.

    packed: uint8 [ceil(n/2)] at any address. Raises UsageError for tensors that do not fit or are not on one GPU.
    """
    n = values.numel()
    if values.dtype not in DTYPES or packed.dtype != torch.uint8 or packed.numel() != packed_nbytes(n):
        raise UsageError(f"values: {values.dtype} with {n} entries, packed: {packed.dtype} with {packed.numel()}")
    if out.dtype != torch.float32 or out.numel() != block_count(n, block_size):
        raise UsageError(f"out: {out.dtype} with {out.numel()} entries, expected {block_count(n, block_size)} float32")
    check_tensors(values.device, values=values, packed=packed, out=out)
    check_aligned(values=values)
    if n == 0:
        return
    from qformat.kernels.triton.block_dots_kernel import block_dots_kernel

    with on_device(values.device):
        given = constants(block_size, aligned=is_aligned(packed))
        block_dots_kernel[(-(-n // TILE),)](values, packed, device_codebook(values.device), out, n, **given, **OPTIONS)
