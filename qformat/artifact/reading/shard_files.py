"""The shards of an artifact, open for reading at any place: for whoever streams them into memory that is used again.

Buffers that are used again are faster than a mapping, since a fresh page costs more than copying or decoding it, and
the pages of a mapped file would count as memory of the process.
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
    """Reads components and kept tensors by their names in the shards. Any thread may call it."""

    def __init__(self, structure: Structure, stack: ExitStack) -> None:
        """Open every shard; `stack` closes them. Raises ArtifactError."""
        self._structure = structure
        self._descriptors = {
            name: stack.enter_context(open_regular(structure.path, name, error=ArtifactError))
            for name in structure.shard_nbytes
        }

    def path_of(self, name: str) -> Path:
        """Return the file in which a component lies."""
        return self._structure.path / self._structure.located[name].shard

    def entry_of(self, name: str) -> TensorEntry:
        """Return where in its file a component lies."""
        return self._structure.located[name].entry

    def read_into(self, name: str, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with bytes of a component from its byte `offset` on. Raises ArtifactError."""
        located = self._structure.located[name]
        path, start = self._structure.path / located.shard, located.entry.start + offset
        read_exactly(self._descriptors[located.shard], start, out.data, path=path, error=ArtifactError)

    def read(self, name: str) -> NDArray[np.uint8]:
        """Return all bytes of a component. Raises ArtifactError."""
        out = np.empty(self.entry_of(name).nbytes, np.uint8)
        self.read_into(name, 0, out)
        return out
