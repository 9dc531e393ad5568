"""What a conversion reads from: the interface that every kind of source implements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qformat.artifact.components import Component, PackedShape
from qformat.artifact.manifest import JsonObject
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.quant_state import QuantState


@dataclass(frozen=True, slots=True)
class SourceTensor(TensorSpec):
    """A tensor of a source: what the header says, and the file that it comes from."""

    file: str


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight that a source has in 4 bit already, in the layout of an artifact: it is adopted, not encoded.

    state: what its quant_state says; parts: its other components, to be read like any tensor. Codes may be stored in
    wider elements than bytes, and a little longer than they are.
    """

    layout: PackedShape
    state: QuantState
    parts: Mapping[Component, SourceTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts.values())


class Source(Protocol):
    """A checkpoint that can be converted. Raises SourceError for everything that is wrong with its files."""

    @property
    def kind(self) -> str:
        """Short name of the kind of source, as the manifest records it."""

    @property
    def location(self) -> Path:
        """The folder, for messages."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name, but for those in `packed`."""

    @property
    def packed(self) -> Mapping[str, PackedWeight]:
        """Weights that are in 4 bit already, by name; most kinds of source have none."""

    @property
    def config(self) -> JsonObject:
        """The model's config.json."""

    @property
    def side_files(self) -> Mapping[str, int]:
        """Files to carry over unchanged (tokenizer, licence, ...): name and size in bytes."""

    @property
    def state_when_opened(self) -> JsonObject:
        """What `state` was for each file just before it was first read."""

    def describe(self) -> JsonObject:
        """Return what the manifest records about the source: nothing that depends on where it lies."""

    def fingerprint(self) -> str:
        """Return a digest of everything a plan is made from: headers, config, side files' bytes."""

    def state(self) -> JsonObject:
        """Return what tells cheaply that no file was changed since (sizes, times): equal means unchanged."""

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `offset` on. Safe to call from several threads."""

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""

    def close(self) -> None:
        """Let go of open files."""
