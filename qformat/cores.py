"""Work on several threads: how many cores this process may use, and tasks that stop together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def usable_cores() -> int:
    """Return one for each core that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    tasks: Mapping[str, _Task],
    do: Callable[[_Task], _Result],
    *,
    workers: int,
    stopping: threading.Event,
    thread_name: str,
    on_stop: Callable[[], None] = lambda: None,
) -> dict[str, _Result]:
    """Run tasks on threads and return the results by name.

    On the first error `stopping` is set for all of them, and `on_stop` wakes those that wait for something else.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix=thread_name) as pool:
        futures = {name: pool.submit(do, task) for name, task in tasks.items()}
        try:
            finished, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            return {name: future.result() for name, future in futures.items() if future in finished}
        except BaseException:
            stopping.set()
            on_stop()
            pool.shutdown(cancel_futures=True)
            raise
