"""The number of CPU cores that this process may use, and tasks on threads that stop together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def usable_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    tasks: Mapping[_Key, _Task],
    do: Callable[[_Task], _Result],
    *,
    workers: int,
    thread_name: str,
    stopping: threading.Event | None = None,
    on_stop: Callable[[], None] = lambda: None,
) -> dict[_Key, _Result]:
    """Run tasks on threads and return their results by key, in the order of the tasks.

    After the first error, no further task starts, `stopping` is set and `on_stop` is called. The error is raised when
    every thread has ended.

    Args:
        tasks: Tasks by key.
        do: Function that runs one task.
        workers: Number of threads.
        thread_name: Prefix of the names of the threads.
        stopping: Event that running tasks can check in order to end early.
        on_stop: Function that wakes tasks that wait for something else.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix=thread_name) as pool:
        futures = {key: pool.submit(do, task) for key, task in tasks.items()}
        try:
            finished, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            return {key: future.result() for key, future in futures.items() if future in finished}
        except BaseException:
            if stopping is not None:
                stopping.set()
            on_stop()
            pool.shutdown(cancel_futures=True)
            raise
