"""Work on several threads: how many cores this process may use, and tasks that stop together."""

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
    """Return one for each core that this process may run on."""
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
    """Run tasks on threads and return the results by key, in the order of the tasks.

    On the first error no further task is begun and `stopping` is set, for those tasks that look at it; `on_stop` wakes
    those that wait for something else. The error is raised once every thread has ended.
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
