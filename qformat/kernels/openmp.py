"""Run a function on torch's team of OpenMP threads.

Between two operations, torch's threads spin while they wait for the next one. Threads of our own would compete with
them for the cores (on two cores, a token took 310 ms with a thread pool and 90 ms on one thread). The work therefore
runs on the same team, through the OpenMP library that torch has loaded. If that library cannot be found, the work runs
on one thread.
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
    torch.get_num_threads()  # makes torch load the library
    if not _MAPS.exists():
        return None
    paths = {line.split(maxsplit=5)[5] for line in _MAPS.read_text().splitlines() if "libgomp" in line}
    if len(paths) != 1:  # with two libraries in the process, torch's team is unknown
        return None
    function = ctypes.CDLL(paths.pop()).GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def run(function_address: int, data_address: int, n_threads: int) -> bool:
    """Call a C function once in each of n threads of the team.

    Args:
        function_address: Address of a function `void f(void *data)`.
        data_address: Address that is passed to the function.
        n_threads: Number of threads.

    Returns:
        Whether the function ran. False if torch has no such team.
    """
    parallel = _parallel()
    if parallel is None:
        return False
    parallel(function_address, data_address, n_threads, 0)
    return True
