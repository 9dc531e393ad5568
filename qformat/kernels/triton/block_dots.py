"""Sums over blocks on a GPU: the last step of the gradient of the scales, in one launch per band of the weight."""

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
"""Words of codes per lane. Their 64 bytes of values (in 16 bit) are in flight at the same time."""

TILE = N_WARPS * 32 * ROUNDS * 8
"""Values per program: complete blocks for every block size."""

OPTIONS: dict[str, Any] = {"num_warps": N_WARPS, "enable_fp_fusion": True}
"""Options of the compiler. No reference fixes the bits of these sums, so a fused multiply-add only rounds less."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def constants(block_size: int, *, aligned: bool) -> dict[str, Any]:
    """Return the kernel's compile-time arguments, for the launch and for `tools/gpu/kernel_cases.py`.

    Args:
        block_size: Number of elements per block.
        aligned: Whether the address of the codes is a multiple of 16 bytes.
    """
    return {"BLOCK_SIZE": block_size, "ALIGNED": aligned, "LANES": N_WARPS * 32, "ROUNDS": ROUNDS}


def block_dots(values: Tensor, packed: Tensor, block_size: int, out: Tensor) -> None:
    """Sum values times codebook entries over each block: out[b] = sum over block b of values[j] * codebook[code[j]].

    The call is asynchronous.

    Args:
        values: Values [n] in bf16, fp16 or fp32, 16-byte aligned.
        packed: Packed codes, uint8 [ceil(n / 2)], at any address.
        block_size: Number of elements per block.
        out: Tensor for the sums, float32 [n_blocks].

    Raises:
        UsageError: The tensors do not fit each other or are not on one GPU.
    """
    n = values.numel()
    if values.dtype not in DTYPES or packed.dtype != torch.uint8 or packed.numel() != packed_nbytes(n):
        raise UsageError(
            f"values: found {values.dtype} with {n} entries and packed {packed.dtype} with {packed.numel()}, "
            f"expected bfloat16, float16 or float32 and packed torch.uint8 with {packed_nbytes(n)}"
        )
    if out.dtype != torch.float32 or out.numel() != block_count(n, block_size):
        raise UsageError(
            f"out: found {out.dtype} with {out.numel()} entries, "
            f"expected torch.float32 with {block_count(n, block_size)}"
        )
    check_tensors(values.device, values=values, packed=packed, out=out)
    check_aligned(values=values)
    if n == 0:
        return
    from qformat.kernels.triton.block_dots_kernel import block_dots_kernel

    with on_device(values.device):
        given = constants(block_size, aligned=is_aligned(packed))
        block_dots_kernel[(-(-n // TILE),)](values, packed, device_codebook(values.device), out, n, **given, **OPTIONS)
