"""Notification of users who wait for the compilation of kernels, which happens once per machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COMPILING_TAKES_S = 0.5
"""Time after which kernels are assumed to be compiling, in seconds. Loading those of a conversion from the cache takes
half of it, mostly numba's own start; compiling takes 2 s."""


@contextmanager
def telling_of_compilation(on_compile: Callable[[], None], *, after_s: float = COMPILING_TAKES_S) -> Iterator[None]:
    """Call a function if the `with` block takes so long that kernels must be compiling.

    Args:
        on_compile: Function to call once, from another thread.
        after_s: Time after which it is called, in seconds.
    """
    timer = threading.Timer(after_s, on_compile)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
