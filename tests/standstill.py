"""Points at which a child process of a test pauses, so that the test can kill or interrupt it there.

A paused child prints a line on stdout. It cannot end before the test has acted, however fast or slow the machine is.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from qformat.artifact.writing.disk import Disk

HELD = "held"
"""Line that a paused child prints."""

GUARD_S = 300
"""Time after which a silent child is assumed to hang. No result depends on it."""


def _say_held() -> None:
    os.write(1, f"{HELD}\n".encode())  # one call, so that the lines of two threads do not mix


def hold_writes(after: int) -> None:
    """In the child: let its threads write `after` times to shards, then pause every further write halfway.

    A kill therefore leaves half a write on the disk. Writes continue when the pool of threads discards its remaining
    work, which happens when the main thread is interrupted, or when the test has sent a line (`go_on`).
    """
    write, numbers, may_go_on = Disk.raw_pwrite, itertools.count(), threading.Event()
    on_stop(may_go_on.set)
    threading.Thread(target=lambda: os.read(0, 1) and may_go_on.set(), daemon=True).start()

    def held_write(disk: Disk, descriptor: int, data: memoryview, offset: int) -> int:
        if threading.current_thread() is threading.main_thread() or may_go_on.is_set() or next(numbers) < after:
            return write(disk, descriptor, data, offset)
        n_written = write(disk, descriptor, data[: max(1, len(data) // 2)], offset)
        _say_held()
        may_go_on.wait()
        return n_written

    Disk.raw_pwrite = held_write  # type: ignore[method-assign]


def hold_call(module: ModuleType, names: tuple[str, ...], number: int) -> None:
    """In the child: pause forever before a call to one of the functions, given by its number, counted from 0."""
    numbers = itertools.count()

    def held(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(numbers) == number:
                _say_held()
                threading.Event().wait()
            return original(*arguments, **named)

        return call

    for name in names:
        setattr(module, name, held(getattr(module, name)))


def on_stop(do: Callable[[], object]) -> None:
    """In the child: call a function when a pool of threads discards its remaining work."""
    shutdown = ThreadPoolExecutor.shutdown

    def announced(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            do()
        shutdown(pool, wait, cancel_futures=cancel_futures)

    ThreadPoolExecutor.shutdown = announced  # type: ignore[method-assign]


def wait_until_held(process: subprocess.Popen[str], n_threads: int = 1) -> None:
    """In the test: wait until a number of threads of the child have paused. Fails the test if the child ends."""
    assert process.stdout is not None
    for _ in range(n_threads):
        line = process.stdout.readline()
        if line != HELD + "\n":
            process.kill()
            raise AssertionError(f"the child ended before it stood still: {line}{process.communicate()}")


def go_on(process: subprocess.Popen[str]) -> None:
    """In the test: let the paused writes of the child continue."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
