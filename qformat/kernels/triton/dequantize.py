"""Dequantization on a GPU: from packed codes and both levels of absmax to 16-bit or 32-bit weights, in one launch.

The result is bit-identical to `codec.nested.decode_absmax`, then `codec.nf4.decode`, rounded by `codec.floats.narrow`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qformat.errors import UsageError
from qformat.kernels.device_codebook import device_codebook
from qformat.kernels.packed_weight import PackedWeight
from qformat.kernels.triton.launch import check_aligned, check_tensors, is_aligned, on_device

N_WARPS = 4
ROUNDS = 8
"""Words per lane. More rounds share the set-up and keep more loads in flight: 11, 8.4, 7.1 and 6.3 instructions per
weight with 1, 2, 4 and 8 rounds (sm_90), all with at most 40 registers."""

TILE = N_WARPS * 32 * ROUNDS * 8
"""Elements per program. It divides 256 blocks of the smallest size, so a tile has only one nested absmax."""

OPTIONS: dict[str, Any] = {"num_warps": N_WARPS, "enable_fp_fusion": False}
"""Options of the compiler. A fused multiply-add would round the absmax once instead of twice."""

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How to launch the dequantization of one weight.

    Attributes:
        n_programs: Size of the grid.
        tiles: The kernel's `TILES`: "whole", "partial" or "mixed".
    """

    n_programs: int
    tiles: str


def plan(n_elements: int, *, aligned: bool) -> LaunchPlan:
    """Return the launch for a weight.

    Args:
        n_elements: Number of elements.
        aligned: Whether the address of the packed codes is a multiple of 16 bytes.
    """
    n_programs = -(-n_elements // TILE)
    if not aligned or n_elements < TILE:
        return LaunchPlan(n_programs, "partial")
    return LaunchPlan(n_programs, "mixed" if n_elements % TILE else "whole")


def constants(block_size: int, *, double_quant: bool, tiles: str) -> dict[str, Any]:
    """Return the kernel's compile-time arguments, for the launch and for `tools/gpu/kernel_cases.py`.

    Args:
        block_size: Number of elements per block.
        double_quant: Whether the absmax values are themselves quantized.
        tiles: "whole", "partial" or "mixed", from `plan`.
    """
    return {
        "BLOCK_SIZE": block_size,
        "NESTED": double_quant,
        "TILES": tiles,
        "LANES": N_WARPS * 32,
        "ROUNDS": ROUNDS,
    }


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Decode a weight. The call is asynchronous.

    Args:
        weight: Weight [N, K] to decode.
        out: Tensor for the result, [N, K], contiguous and 16-byte aligned, in bf16, fp16 or fp32.

    Raises:
        UsageError: `out` does not fit the weight, or a tensor is not on the weight's CUDA device.
    """
    if tuple(out.shape) != weight.shape or out.dtype not in OUT_DTYPES:
        raise UsageError(
            f"out: found {out.dtype} {list(out.shape)}, expected bfloat16, float16 or float32 {list(weight.shape)}"
        )
    check_tensors(weight.device, out=out)
    check_aligned(out=out)
    if weight.n_elements == 0:
        return
    from qformat.kernels.triton.dequantize_kernel import dequantize_kernel

    chosen = plan(weight.n_elements, aligned=is_aligned(weight.packed))
    with on_device(weight.device):
        dequantize_kernel[(chosen.n_programs,)](
            weight.packed,
            weight.absmax,
            weight.nested_absmax,
            weight.nested_quant_map,
            weight.nested_offset,
            device_codebook(weight.device),
            out,
            weight.n_elements,
            **constants(weight.block_size, double_quant=weight.double_quant, tiles=chosen.tiles),
            **OPTIONS,
        )
