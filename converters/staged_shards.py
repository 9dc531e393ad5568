"""The shards of an output while it is made: open at their final size, written at any place by any thread.

What `convert` and `export` share: tasks, one a tensor, touch disjoint byte ranges, so that order and number of threads
change nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.disk import Disk
from qformat.artifact.layout import Shard
from qformat.artifact.staging import Staging
from qformat.converters.plan import Place

Progress = Callable[[int], None]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class StagedShards:
    """Where tasks write. `on_written(shard, start, stop)` is told of every range of bytes that is in a file."""

    folder: Path
    disk: Disk
    descriptors: Mapping[str, int]
    on_written: Callable[[str, int, int], None] = lambda shard, start, stop: None

    def write(self, place: Place, offset: int, data: NDArray[np.generic]) -> None:
        """Write the bytes of an array at a byte offset of a place. Raises TargetError."""
        view = data.data.cast("B")
        start = place.start + offset
        self.disk.write_at(self.descriptors[place.shard], view, start, self.folder / place.shard)
        self.on_written(place.shard, start, start + len(view))

    def write_headers(self, shards: Iterable[Shard]) -> None:
        """Write the header of every shard. Raises TargetError."""
        for shard in shards:
            self.write(Place(shard.name, 0, len(shard.header)), 0, np.frombuffer(shard.header, np.uint8))


def open_shards(shards: Iterable[Shard], staging: Staging, stack: ExitStack) -> dict[str, int]:
    """Open every shard at its final size; return descriptors by name, which `stack` closes. Raises TargetError."""
    descriptors: dict[str, int] = {}
    for shard in shards:
        path = staging.folder / shard.name
        descriptors[shard.name] = staging.disk.open_for_writing(path)
        stack.callback(os.close, descriptors[shard.name])
        staging.disk.set_size(descriptors[shard.name], shard.nbytes, path)
    return descriptors


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
