"""How one run reads its source. A local checkpoint is read at any place, in any order: this is all there is to it.

A source whose bytes arrive once, in an order of its own, begins a reading of its own kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.encoded.decoding_source import DecodingSource
from qformat.converters.sources.source import Source, SourceTensor

Record = Callable[[JsonObject], None]
"""Appends an entry to the journal; any thread may call it."""


class Reading:
    """A run's reading of its source, from the journal of earlier runs to the last byte."""

    def trusted(self, entries: Sequence[JsonObject]) -> list[JsonObject]:
        """Return the entries of the journal about tensors that are to be believed."""
        return [entry for entry in entries if "tensor" in entry]

    def begin(self, tensors: Sequence[SourceTensor], record: Record) -> list[str]:
        """Make ready for reading these tensors, each once from its start to its end.

        Returns their names in the order in which they must be begun.
        """
        return [tensor.name for tensor in tensors]

    def settle(self, tensor: SourceTensor, source_xxh3: str) -> None:
        """Wait until what was read of a tensor is proved as far as it can be while other tensors are missing.

        Raises SourceError for bytes that are not the source's.
        """

    def finish(self) -> None:
        """Wait until everything that was read is proved. Raises SourceError."""

    def close(self) -> None:
        """Let go of what the reading holds, finished or not."""


@runtime_checkable
class PinnedSource(Source, Protocol):
    """A source whose location may stand for something else by the time that an interrupted run goes on."""

    @property
    def pin(self) -> JsonObject:
        """What a later run needs to go on with the same bytes."""


@runtime_checkable
class StreamedSource(Source, Protocol):
    """A source that cannot be read in any order without fetching bytes twice."""

    def new_reading(self) -> Reading:
        """Return the reading of one run; `read_into` serves it while it lasts."""


def pin_of(source: Source) -> JsonObject | None:
    """Return the pin of a source, or of the one that it decodes, if there is one."""
    while not isinstance(source, PinnedSource) and isinstance(source, DecodingSource):
        source = source.stored
    return source.pin if isinstance(source, PinnedSource) else None


def reading_of(source: Source) -> Reading:
    """Return how a run reads this source."""
    return source.new_reading() if isinstance(source, StreamedSource) else Reading()
