"""The tasks of a conversion: one a tensor, each with its place in the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qformat.artifact.components import Component, PackedShape
from qformat.converters.rules.rules import KeepReason
from qformat.converters.sources.source import PackedWeight, SourceTensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where a component goes: a shard and the byte range in its file."""

    shard: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _SourceTask:
    """What every task has: the tensor of the source that it is about."""

    source: SourceTensor

    @property
    def source_nbytes(self) -> int:
        """Bytes that the task reads from the source."""
        return self.source.nbytes


@dataclass(frozen=True, slots=True)
class PackedTask(_SourceTask):
    """A weight to encode, and where each of its components goes. `vouched`: only the recipe says it is a Linear."""

    layout: PackedShape
    places: Mapping[Component, Place]
    vouched: bool


@dataclass(frozen=True, slots=True)
class KeptTask(_SourceTask):
    """A tensor to copy bit for bit, where it goes, and why it is kept."""

    place: Place
    reason: KeepReason


@dataclass(frozen=True, slots=True)
class AdoptedTask(_SourceTask):
    """A weight that the source has in 4 bit already: its components are copied, and where each of them goes.

    `source` stands for all of them: its shape and dtype are the weight's.
    """

    weight: PackedWeight
    places: Mapping[Component, Place]

    @property
    def source_nbytes(self) -> int:
        """Bytes of the components that are copied."""
        return self.weight.nbytes

    @property
    def layout(self) -> PackedShape:
        """Layout of the weight."""
        return self.weight.layout


Task = PackedTask | AdoptedTask | KeptTask


@dataclass(frozen=True, slots=True)
class TensorDigests:
    """What executing a task found: XXH3-128 of each component, or of the kept tensor, and of the source's bytes.

    Those of an adopted weight are its stored components, one after another.
    """

    components: Mapping[Component, str]
    source_xxh3: str
