"""A source whose tensors lose the parts of their names that wrappers put there (`_orig_mod.`, `module.`).

A streamed source stays one: `RenamedReading` translates the names for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.encoded.decoding_source import DecodingSource
from qformat.converters.sources.reading import Reading, Record, StreamedSource
from qformat.converters.sources.source import Source, SourceTensor
from qformat.converters.sources.wrapped.wrappers import without, wrapper_parts
from qformat.errors import Reason, SourceError

MEMBER = "stripped"
"""Member of the manifest's record of the source: the parts that were removed."""


def stripped(stored: Source) -> Source:
    """Return a source under the names that it has without wrappers. Closing it closes `stored`."""
    return StrippedStream(stored) if isinstance(stored, StreamedSource) else StrippedNames(stored)


class StrippedNames(DecodingSource):
    """The stored source under other names. Without wrappers in it, all names stay."""

    def __init__(self, stored: Source) -> None:
        super().__init__(stored)
        self.kind, self.config = stored.kind, stored.config
        self._parts = wrapper_parts([*stored.tensors, *stored.packed])
        self._stored = {without(name, self._parts): tensor for name, tensor in stored.tensors.items()}
        self.tensors: Mapping[str, SourceTensor] = {
            name: replace(tensor, name=name) for name, tensor in self._stored.items()
        }
        self.packed = {without(name, self._parts): weight for name, weight in stored.packed.items()}
        if len(self.tensors) + len(self.packed) < len(stored.tensors) + len(stored.packed):
            self._refuse_same_name()

    def describe(self) -> JsonObject:
        """Return the stored source's record, with the parts that are removed."""
        removed: JsonObject = {MEMBER: list(self._parts)} if self._parts else {}
        return {**self.stored.describe(), **removed}

    def fingerprint(self) -> str:
        """Return the stored source's fingerprint and the parts that are removed."""
        return f"{' '.join(self._parts)} {self.stored.fingerprint()}"

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of a tensor.

        Args:
            tensor: The tensor to read.
            offset: Offset of the first byte in the tensor.
            out: Buffer to fill.
        """
        self.stored.read_into(self._stored.get(tensor.name, tensor), offset, out)

    def _refuse_same_name(self) -> None:
        seen: set[str] = set()
        for name, tensor in self.stored.tensors.items():
            new = without(name, self._parts)
            if new in seen:
                raise SourceError(
                    Reason.DUPLICATE_TENSOR, self.location / tensor.file, f"two tensors would be named {new!r}",
                    tensor=name, next_step="Keep one of the two in the checkpoint",
                )  # fmt: skip
            seen.add(new)


class StrippedStream(StrippedNames):
    """The same for a source that is read as a stream."""

    stored: StreamedSource

    def new_reading(self) -> Reading:
        """Return the reading of one run of the stored source, under the other names."""
        return RenamedReading(self.stored.new_reading(), self._stored)


class RenamedReading(Reading):
    """A reading whose tensors have other names than in the stored source.

    Args:
        stored: Reading of the stored source.
        tensors: The tensors of the stored source by their other names.
    """

    def __init__(self, stored: Reading, tensors: Mapping[str, SourceTensor]) -> None:
        self._reading = stored
        self._tensors = tensors
        self._names = {tensor.name: name for name, tensor in tensors.items()}

    def trusted(self, entries: Sequence[JsonObject]) -> list[JsonObject]:
        """Return the journal entries about tensors that can be trusted."""
        stored = [
            {**entry, "tensor": self._tensors[str(entry["tensor"])].name} if "tensor" in entry else entry
            for entry in entries
        ]
        return [{**entry, "tensor": self._names[str(entry["tensor"])]} for entry in self._reading.trusted(stored)]

    def begin(self, tensors: Sequence[SourceTensor], record: Record) -> list[str]:
        """Prepare to read these tensors, each once from start to end.

        Args:
            tensors: Tensors that the run will read.
            record: Appends an entry to the journal.

        Returns:
            Their names in the order in which they must be started.
        """
        order = self._reading.begin([self._tensors[tensor.name] for tensor in tensors], record)
        return [self._names[name] for name in order]

    def settle(self, tensor: SourceTensor, source_xxh3: str) -> None:
        """Wait until the bytes of a tensor are verified, as far as is possible while other tensors are missing.

        Args:
            tensor: A tensor that was read to its end.
            source_xxh3: XXH3-128 of the bytes that were read.

        Raises:
            SourceError: The bytes are not those of the source.
        """
        self._reading.settle(self._tensors[tensor.name], source_xxh3)

    def finish(self) -> None:
        """Wait until everything that was read is verified.

        Raises:
            SourceError: Some bytes are not those of the source.
        """
        self._reading.finish()

    def close(self) -> None:
        """Release all resources, whether reading has finished or not."""
        self._reading.close()
