"""Users are notified once if kernels are compiled, and not otherwise."""

from __future__ import annotations

import threading

from qformat.codec.cpu.blocks import warm_up
from qformat.codec.cpu.compiling import telling_of_compilation
from qformat.codec.floats import FloatFormat

LONG_S = 3600.0


def test_a_long_wait_is_reported_once_while_it_lasts() -> None:
    told: list[str] = []
    arrived = threading.Event()

    def tell() -> None:
        told.append("compiling")
        arrived.set()

    with telling_of_compilation(tell, after_s=0.0):
        assert arrived.wait(LONG_S)
    assert told == ["compiling"]


def test_cached_kernels_are_not_reported() -> None:
    told: list[str] = []
    with telling_of_compilation(lambda: told.append("compiling"), after_s=LONG_S):
        for float_format in FloatFormat:
            warm_up(float_format)
    assert not told


def test_nothing_is_reported_after_the_end() -> None:
    told: list[str] = []
    with telling_of_compilation(lambda: told.append("compiling"), after_s=LONG_S):
        (timer,) = (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))
    timer.join(LONG_S)
    assert not timer.is_alive()
    assert not told
