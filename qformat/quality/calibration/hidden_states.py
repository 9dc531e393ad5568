"""Hidden states of a text before a layer, kept in a file: they need no memory and survive a crash."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qformat.artifact.digests import Xxh3, xxh3_of_range
from qformat.artifact.reading.regular_files import open_regular
from qformat.artifact.writing.disk import Disk
from qformat.errors import ArtifactError


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Hidden states in a file.

    Attributes:
        path: The file, which contains float32 values.
        shape: [n_windows, length, width].
        digest: XXH3-128 of the file.
    """

    path: Path
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return 4 * int(np.prod(self.shape, dtype=np.int64))

    def read(self) -> Tensor:
        """Return all hidden states as a view of the mapped file. Changes to it are not written to the file."""
        return torch.from_numpy(np.memmap(self.path, np.float32, mode="c", shape=self.shape))

    def is_whole(self) -> bool:
        """Return whether the file exists and is intact."""
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            return False
        with open_regular(self.path.parent, self.path.name, error=ArtifactError) as file:
            return xxh3_of_range(file, 0, self.nbytes, path=self.path, error=ArtifactError) == self.digest


class HiddenStatesWriter:
    """Writes hidden states window by window, in order."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path = path
        self._shape: tuple[int, ...] = (0,)
        self._disk = disk
        self._digest = Xxh3()
        self._written = 0
        self._descriptor = disk.open_for_writing(path)

    def __enter__(self) -> HiddenStatesWriter:
        self._disk.set_size(self._descriptor, 0, self._path)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, hidden: Tensor) -> None:
        """Append windows [n, length, width].

        Raises:
            TargetError: The file cannot be written.
        """
        data = hidden.contiguous().numpy().data.cast("B")
        self._digest.update(data)
        self._disk.write_at(self._descriptor, data, self._written, self._path)
        self._written += len(data)
        self._shape = (self._shape[0] + len(hidden), *hidden.shape[1:])

    def finish(self) -> HiddenStates:
        """Return the hidden states written so far."""
        return HiddenStates(self._path, self._shape, self._digest.hexdigest())
