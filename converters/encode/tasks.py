"""The tasks of a conversion: one per tensor, each with its place in the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qformat.artifact.components import Component, PackedShape
from qformat.converters.rules.rules import KeepReason
from qformat.converters.sources.source import PackedWeight, SourceTensor


@dataclass(frozen=True, slots=True)
class Place:
    """Byte range of a tensor or component in a shard.

    Attributes:
        shard: File name of the shard.
        start: Offset of the first byte in the file.
        nbytes: Size in bytes.
    """

    shard: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _SourceTask:
    """Base of all tasks: the source tensor to process."""

    source: SourceTensor

    @property
    def source_nbytes(self) -> int:
        """Number of bytes that the task reads from the source."""
        return self.source.nbytes


@dataclass(frozen=True, slots=True)
class PackedTask(_SourceTask):
    """A weight to encode.

    Attributes:
        source: The source tensor.
        layout: Shape, dtype and encoding options of the weight.
        places: Where each component is written.
        vouched: Whether only the recipe, not the default table, says that the module is a Linear.
    """

    layout: PackedShape
    places: Mapping[Component, Place]
    vouched: bool


@dataclass(frozen=True, slots=True)
class KeptTask(_SourceTask):
    """A tensor to copy bit for bit.

    Attributes:
        source: The source tensor.
        place: Where it is written.
        reason: Why it is kept.
    """

    place: Place
    reason: KeepReason


@dataclass(frozen=True, slots=True)
class AdoptedTask(_SourceTask):
    """A weight that is already in 4 bit in the source and whose components are copied.

    Attributes:
        source: The decoded weight's name, shape and dtype.
        weight: The stored components.
        places: Where each component is written.
    """

    weight: PackedWeight
    places: Mapping[Component, Place]

    @property
    def source_nbytes(self) -> int:
        """Size in bytes of the components to copy."""
        return self.weight.nbytes

    @property
    def layout(self) -> PackedShape:
        """Shape, dtype and encoding options of the weight."""
        return self.weight.layout


Task = PackedTask | AdoptedTask | KeptTask


@dataclass(frozen=True, slots=True)
class TensorDigests:
    """XXH3-128 digests computed by a task.

    Attributes:
        components: Digest of each component. A kept tensor has only one.
        source_xxh3: Digest of the source's bytes. For an adopted weight, these are its stored components in order.
    """

    components: Mapping[Component, str]
    source_xxh3: str
