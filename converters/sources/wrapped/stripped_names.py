"""A source whose tensors lose the parts of their names that wrappers put there (`_orig_mod.`, `module.`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.encoded.decoding_source import DecodingSource
from qformat.converters.sources.source import Source, SourceTensor
from qformat.converters.sources.wrapped.wrappers import without, wrapper_parts
from qformat.errors import Reason, SourceError

MEMBER = "stripped"
"""Member of the manifest's record of the source: the parts that were removed."""


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
