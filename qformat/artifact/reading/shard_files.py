"""Random access to the shards of an artifact, for streaming them through reused buffers.

Reused buffers are faster than a mapping, because a new page costs more than copying or decoding its contents. The pages
of a mapped file would also count as memory of the process.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.header import TensorEntry
from qformat.artifact.reading.regular_files import open_regular, read_exactly
from qformat.artifact.reading.structure import Structure
from qformat.errors import ArtifactError


class ShardFiles:
    """Reads components and kept tensors by their names in the shards. Its methods are thread-safe."""

    def __init__(self, structure: Structure, stack: ExitStack) -> None:
        """Open every shard.

        Args:
            structure: Checked structure of the artifact.
            stack: Exit stack that closes the shards.

        Raises:
            ArtifactError: A shard cannot be opened.
        """
        self._structure = structure
        self._descriptors = {
            name: stack.enter_context(open_regular(structure.path, name, error=ArtifactError))
            for name in structure.shard_nbytes
        }

    def path_of(self, name: str) -> Path:
        """Return the path of the shard that contains a component."""
        return self._structure.path / self._structure.located[name].shard

    def entry_of(self, name: str) -> TensorEntry:
        """Return the header entry of a component."""
        return self._structure.located[name].entry

    def read_into(self, name: str, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill an array with bytes of a component.

        Args:
            name: Name of the component in the shards.
            offset: Offset of the first byte within the component.
            out: Array to fill, uint8.

        Raises:
            ArtifactError: The shard cannot be read.
        """
        located = self._structure.located[name]
        path, start = self._structure.path / located.shard, located.entry.start + offset
        read_exactly(self._descriptors[located.shard], start, out.data, path=path, error=ArtifactError)

    def read(self, name: str) -> NDArray[np.uint8]:
        """Return all bytes of a component.

        Raises:
            ArtifactError: The shard cannot be read.
        """
        out = np.empty(self.entry_of(name).nbytes, np.uint8)
        self.read_into(name, 0, out)
        return out
