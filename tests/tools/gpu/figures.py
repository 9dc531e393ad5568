"""A fictional GPU, and results that checks on it could give."""

from __future__ import annotations

from tools.gpu.results import Result

DEVICE = {"name": "Test GPU", "compute_capability": "9.0", "multiprocessors": 132, "memory_nbytes": 1}
GOOD = Result("exact", "a", "wrong weights", 0, "", True)
BAD = Result("exact", "b", "wrong weights", 3, "", False)
FAST = Result("speed", "a", "bandwidth", 2000.0, "GB/s")
