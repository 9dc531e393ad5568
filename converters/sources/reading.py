"""How a run reads its source. A local checkpoint is read at any offset in any order, which needs only `Reading`.

A source whose bytes arrive once and in a fixed order provides its own subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.encoded.decoding_source import DecodingSource
from qformat.converters.sources.source import Source, SourceTensor

Record = Callable[[JsonObject], None]
"""Appends an entry to the journal. Any thread may call it."""


class Reading:
    """Reads a source during one run. This base class suits sources that can be read in any order."""

    def trusted(self, entries: Sequence[JsonObject]) -> list[JsonObject]:
        """Return the journal entries about tensors that can be trusted."""
        return [entry for entry in entries if "tensor" in entry]

    def begin(self, tensors: Sequence[SourceTensor], record: Record) -> list[str]:
        """Prepare to read these tensors, each once from start to end.

        Args:
            tensors: Tensors that the run will read.
            record: Appends an entry to the journal.

        Returns:
            Their names in the order in which they must be started.
        """
        return [tensor.name for tensor in tensors]

    def settle(self, tensor: SourceTensor, source_xxh3: str) -> None:
        """Wait until the bytes of a tensor are verified, as far as is possible while other tensors are missing.

        Args:
            tensor: A tensor that was read to its end.
            source_xxh3: XXH3-128 of the bytes that were read.

        Raises:
            SourceError: The bytes are not those of the source.
        """

    def finish(self) -> None:
        """Wait until everything that was read is verified.

        Raises:
            SourceError: Some bytes are not those of the source.
        """

    def close(self) -> None:
        """Release all resources, whether reading has finished or not."""


@runtime_checkable
class PinnedSource(Source, Protocol):
    """A source whose location may refer to different data by the time an interrupted run is resumed."""

    @property
    def pin(self) -> JsonObject:
        """What a later run needs to resume with the same bytes."""


@runtime_checkable
class StreamedSource(Source, Protocol):
    """A source that cannot be read in arbitrary order without fetching bytes twice."""

    def new_reading(self) -> Reading:
        """Return the reading of one run, from which `read_into` takes its bytes meanwhile."""


def pin_of(source: Source) -> JsonObject | None:
    """Return the pin of a source, or of the source that it decodes, or None."""
    while not isinstance(source, PinnedSource) and isinstance(source, DecodingSource):
        source = source.stored
    return source.pin if isinstance(source, PinnedSource) else None


def reading_of(source: Source) -> Reading:
    """Return how a run reads this source."""
    return source.new_reading() if isinstance(source, StreamedSource) else Reading()
