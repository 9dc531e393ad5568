"""bitsandbytes' kernels on the weights that qformat's kernels are timed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qformat.kernels.device_codebook import device_codebook
from qformat.kernels.packed_weight import PackedWeight


def bitsandbytes_state(weight: PackedWeight) -> Any:
    """Return a weight as a QuantState of bitsandbytes, or None if bitsandbytes is not installed."""
    try:
        from bitsandbytes.functional import QuantState
    except ImportError:
        return None
    nested = QuantState(absmax=weight.nested_absmax, code=weight.nested_quant_map, blocksize=256, dtype=torch.float32)
    return QuantState(
        absmax=weight.absmax, shape=torch.Size(weight.shape), code=device_codebook(weight.device),
        blocksize=weight.block_size, quant_type="nf4", dtype=torch.bfloat16,
        offset=torch.tensor(weight.nested_offset, device=weight.device), state2=nested,
    )  # fmt: skip


def bitsandbytes_dequantize(weights: list[PackedWeight], outs: list[torch.Tensor]) -> list[Callable[[], object]] | None:
    if bitsandbytes_state(weights[0]) is None:
        return None
    from bitsandbytes.functional import dequantize_4bit

    states = [bitsandbytes_state(weight) for weight in weights]
    return [
        partial(dequantize_4bit, w.packed.view(-1, 1), s, out=o) for w, s, o in zip(weights, states, outs, strict=True)
    ]


def bitsandbytes_product(x: torch.Tensor, weights: list[PackedWeight]) -> list[Callable[[], object]] | None:
    if bitsandbytes_state(weights[0]) is None:
        return None
    from bitsandbytes.functional import gemv_4bit

    states = [bitsandbytes_state(weight) for weight in weights]
    return [partial(gemv_4bit, x, w.packed.view(-1, 1).t(), state=s) for w, s in zip(weights, states, strict=True)]
