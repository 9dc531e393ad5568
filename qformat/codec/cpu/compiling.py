"""The kernels are compiled once on a machine, and loaded from a cache afterwards: whoever waits for that is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COMPILING_TAKES_S = 0.5
"""Loading the kernels of a conversion takes half of this, nearly all of it numba's own start; compiling 2 s."""


@contextmanager
def telling_of_compilation(on_compile: Callable[[], None], *, after_s: float = COMPILING_TAKES_S) -> Iterator[None]:
    """Call `on_compile` once, from another thread, if the block under it takes so long that kernels are compiled."""
    timer = threading.Timer(after_s, on_compile)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
