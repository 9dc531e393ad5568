"""Reads the components of an artifact in order for an export, hashing each on the way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Xxh3
from qformat.artifact.manifest import KeptRecord, PackedRecord
from qformat.artifact.reading.shard_files import ShardFiles
from qformat.errors import ArtifactError, Reason


class StoredPart:
    """A component or kept tensor, read sequentially into buffers of the caller.

    Args:
        shards: The artifact's open shards.
        name: Name in the shards.
        tensor: Name of the tensor, for messages.
        label: Name of the component, for messages.
        expected: XXH3-128 of the bytes, from the manifest.
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
        """Fill `out` with the next bytes.

        Raises:
            ArtifactError: The shard cannot be read.
        """
        self._shards.read_into(self._name, self._position, out)
        self._digest.update(out)
        self._position += out.size

    def read_all(self) -> NDArray[np.uint8]:
        """Return all bytes, after checking their digest.

        Raises:
            ArtifactError: The shard cannot be read, or the digest does not match (component_digest).
        """
        out = np.empty(self._entry.nbytes, np.uint8)
        self.read_into(out)
        self.check()
        return out

    def check(self) -> None:
        """Compare the digest after everything was read.

        Raises:
            ArtifactError: The digest does not match (component_digest).
        """
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
    """Return the data of a kept tensor.

    Args:
        shards: The artifact's open shards.
        name: Name of the tensor.
        record: The tensor in the manifest.
    """
    return StoredPart(shards, name, tensor=name, label="data", expected=record.xxh3)


def packed_parts(shards: ShardFiles, name: str, record: PackedRecord) -> dict[Component, StoredPart]:
    """Return the components of a packed tensor.

    Args:
        shards: The artifact's open shards.
        name: Name of the tensor.
        record: The tensor in the manifest.
    """
    return {
        part: StoredPart(shards, name + part.value, tensor=name, label=part.label, expected=digest)
        for part, digest in record.components.items()
    }
