"""How much memory there is, and how much this process used at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def peak_nbytes(device: torch.device) -> int:
    """Return the most that torch allocated on a GPU, or that the whole process took of the host's memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_nbytes(device: torch.device) -> int | None:
    """Return what can still be allocated on a device without swapping; None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_nbytes() if device.type == "cpu" else None


def free_host_nbytes() -> int | None:
    """Return what the kernel calls available, or less where a control group (a container) allows less; Linux only."""
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
    """Return limit less anonymous memory: what is cached of files, mapped ones too, makes room when it must."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(stat["anon"])) if limit != "max" else None
    except (OSError, KeyError, ValueError):
        return None
