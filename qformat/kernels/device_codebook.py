"""The NF4 codebook as a tensor on each device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qformat.codec.codebooks import NF4_CODEBOOK


@cache
def device_codebook(device: torch.device) -> Tensor:
    """Return the NF4 codebook, float32 [16], on a device.

    The first call for a device copies the codebook. Make this call before you capture a CUDA graph.
    """
    return torch.tensor(NF4_CODEBOOK.tolist(), dtype=torch.float32, device=device)
