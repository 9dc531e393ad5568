"""What an export reads: the components of an artifact in order, each hashed as it passes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Xxh3
from qformat.artifact.manifest import KeptRecord, PackedRecord
from qformat.artifact.reading.shard_files import ShardFiles
from qformat.errors import ArtifactError, Reason


class StoredPart:
    """A component or kept tensor, read from its first byte to its last into given buffers.

    name: in the shards. tensor and label: for messages. expected: its XXH3-128.
    """

    def __init__(self, shards: ShardFiles, name: str, *, tensor: str, label: str, expected: str) -> None:
        self._shards = shards
        self._name = name
        self._tensor = tensor
        self._label = label
        self._expected = expected
        self._entry = shards.entry_of(name)
        self._digest = Xxh3()
        self._position = 0

    def read_into(self, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the next bytes. Raises ArtifactError."""
        self._shards.read_into(self._name, self._position, out)
        self._digest.update(out)
        self._position += out.size

    def read_all(self) -> NDArray[np.uint8]:
        """Return all bytes, checked. Raises ArtifactError."""
        out = np.empty(self._entry.nbytes, np.uint8)
        self.read_into(out)
        self.check()
        return out

    def check(self) -> None:
        """Compare the digest once everything is read. Raises ArtifactError (component_digest)."""
        assert self._position == self._entry.nbytes
        if (found := self._digest.hexdigest()) != self._expected:
            where = f"{self._label} (bytes {self._entry.start} to {self._entry.stop})"
            raise ArtifactError(
                Reason.COMPONENT_DIGEST,
                self._shards.path_of(self._name),
                f"{where} was changed: XXH3-128 {found}, expected {self._expected}",
                tensor=self._tensor,
                next_step="Fetch the file again",
            )


def kept_part(shards: ShardFiles, name: str, record: KeptRecord) -> StoredPart:
    """Return the data of a kept tensor."""
    return StoredPart(shards, name, tensor=name, label="data", expected=record.xxh3)


def packed_parts(shards: ShardFiles, name: str, record: PackedRecord) -> dict[Component, StoredPart]:
    """Return the components of a packed tensor."""
    return {
        part: StoredPart(shards, name + part.value, tensor=name, label=part.label, expected=digest)
        for part, digest in record.components.items()
    }
