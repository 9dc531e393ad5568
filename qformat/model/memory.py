"""How much memory this process used at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_nbytes(device: torch.device) -> int:
    """Return the most that torch allocated on a GPU, or that the whole process took of the host's memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
