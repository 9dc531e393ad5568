"""The shards of an output while it is made: open at their final size, written at any place by any thread.

What `convert` and `export` share: tasks, one a tensor, touch disjoint byte ranges, so that order and number of threads
change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.digests import xxh3_of_range
from qformat.artifact.layout import Shard
from qformat.artifact.reading.regular_files import read_exactly
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.staging import Staging
from qformat.converters.encode.tasks import Place
from qformat.errors import ArtifactError

Progress = Callable[[int], None]


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

    def read(self, place: Place) -> NDArray[np.uint8]:
        """Return the bytes of a place. Raises ArtifactError."""
        data = np.empty(place.nbytes, np.uint8)
        path = self.folder / place.shard
        read_exactly(self.descriptors[place.shard], place.start, data.data, path=path, error=ArtifactError)
        return data

    def digest(self, place: Place) -> str:
        """Return the XXH3-128 of the bytes of a place. Raises ArtifactError."""
        stop, path = place.start + place.nbytes, self.folder / place.shard
        return xxh3_of_range(self.descriptors[place.shard], place.start, stop, path=path, error=ArtifactError)

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
