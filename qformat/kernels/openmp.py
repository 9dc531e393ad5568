"""torch's own team of OpenMP threads, for work that is not torch's.

Between two operations torch's threads spin, ready for the next one. Threads of our own would fight them for the cores
(measured on two cores: a token took 310 ms with a pool, 90 ms on one thread). So work is handed to the same team,
through the OpenMP library that torch has loaded; where there is none that can be found, it runs on one thread.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

_MAPS = Path("/proc/self/maps")


@cache
def _parallel() -> Any:
    """Return libgomp's GOMP_parallel(function, data, n_threads, flags), or None."""
    torch.get_num_threads()  # torch starts its library now, if it has not yet
    if not _MAPS.exists():
        return None
    paths = {line.split(maxsplit=5)[5] for line in _MAPS.read_text().splitlines() if "libgomp" in line}
    if len(paths) != 1:  # with two teams in the process, which is torch's?
        return None
    function = ctypes.CDLL(paths.pop()).GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def run(function_address: int, data_address: int, n_threads: int) -> bool:
    """Call a C function void(void*) once in each of n threads of the team; return False if there is no team."""
    parallel = _parallel()
    if parallel is None:
        return False
    parallel(function_address, data_address, n_threads, 0)
    return True
