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
class PackedTask:
    """A weight to encode, and where each of its components goes. `vouched`: only the recipe says it is a Linear."""

    source: SourceTensor
    layout: PackedShape
    places: Mapping[Component, Place]
    vouched: bool


@dataclass(frozen=True, slots=True)
class KeptTask:
    """A tensor to copy bit for bit, where it goes, and why it is kept."""

    source: SourceTensor
    place: Place
    reason: KeepReason


@dataclass(frozen=True, slots=True)
class AdoptedTask:
    """A weight that the source has in 4 bit already: its components are copied, and where each of them goes.

    `source` stands for all of them: its shape and dtype are the weight's, its bytes those that are copied.
    """

    source: SourceTensor
    weight: PackedWeight
    places: Mapping[Component, Place]

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
