"""Measure free memory and the peak memory use of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def peak_nbytes(device: torch.device) -> int:
    """Return the peak memory use in bytes: torch's allocations on a GPU, or the resident memory of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_nbytes(device: torch.device) -> int | None:
    """Return the number of bytes that can be allocated on a device without swapping, or None if that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_nbytes() if device.type == "cpu" else None


def free_host_nbytes() -> int | None:
    """Return the host's available memory in bytes, or the remainder of a container's limit if that is lower.

    Linux only; None on other systems.
    """
    found = [nbytes for nbytes in (_available(), _left_of_control_group()) if nbytes is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    fields = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(fields[0][1]) * 1024 if fields else None


def _left_of_control_group() -> int | None:
    """Return the limit minus anonymous memory. The kernel evicts file pages, mapped ones included, when it must."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(stat["anon"])) if limit != "max" else None
    except (OSError, KeyError, ValueError):
        return None
