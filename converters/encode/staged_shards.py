"""The shards of an unfinished output: open at their final size, and writable at any offset from any thread.

`convert` and `export` share this. Each task handles one tensor and writes disjoint byte ranges, so that neither the
order of tasks nor the number of threads affects the output.
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
    """The open shards that tasks write to.

    Attributes:
        folder: The staged directory.
        disk: Interface to the file system.
        descriptors: Descriptors of the open shards, keyed by name.
        on_written: Called with shard, start and stop for every byte range that was written.
    """

    folder: Path
    disk: Disk
    descriptors: Mapping[str, int]
    on_written: Callable[[str, int, int], None] = lambda shard, start, stop: None

    def write(self, place: Place, offset: int, data: NDArray[np.generic]) -> None:
        """Write the bytes of an array.

        Args:
            place: Byte range reserved for the tensor or component.
            offset: Byte offset within the place.
            data: The array to write.

        Raises:
            TargetError: The bytes cannot be written.
        """
        view = data.data.cast("B")
        start = place.start + offset
        self.disk.write_at(self.descriptors[place.shard], view, start, self.folder / place.shard)
        self.on_written(place.shard, start, start + len(view))

    def read(self, place: Place) -> NDArray[np.uint8]:
        """Return the bytes of a place.

        Raises:
            ArtifactError: The shard cannot be read.
        """
        data = np.empty(place.nbytes, np.uint8)
        path = self.folder / place.shard
        read_exactly(self.descriptors[place.shard], place.start, data.data, path=path, error=ArtifactError)
        return data

    def digest(self, place: Place) -> str:
        """Return the XXH3-128 of the bytes of a place.

        Raises:
            ArtifactError: The shard cannot be read.
        """
        stop, path = place.start + place.nbytes, self.folder / place.shard
        return xxh3_of_range(self.descriptors[place.shard], place.start, stop, path=path, error=ArtifactError)

    def write_headers(self, shards: Iterable[Shard]) -> None:
        """Write the header of every shard.

        Raises:
            TargetError: A header cannot be written.
        """
        for shard in shards:
            self.write(Place(shard.name, 0, len(shard.header)), 0, np.frombuffer(shard.header, np.uint8))


def open_shards(shards: Iterable[Shard], staging: Staging, stack: ExitStack) -> dict[str, int]:
    """Open every shard at its final size and return the descriptors by name.

    Args:
        shards: The planned shards.
        staging: The staged directory.
        stack: Closes the descriptors.

    Raises:
        TargetError: A shard cannot be created, or the disk is full.
    """
    descriptors: dict[str, int] = {}
    for shard in shards:
        path = staging.folder / shard.name
        descriptors[shard.name] = staging.disk.open_for_writing(path)
        stack.callback(os.close, descriptors[shard.name])
        staging.disk.set_size(descriptors[shard.name], shard.nbytes, path)
    return descriptors
