"""The interface that every kind of source implements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qformat.artifact.components import Component, PackedShape
from qformat.artifact.manifest import JsonObject
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.quant_state import QuantState


@dataclass(frozen=True, slots=True)
class SourceTensor(TensorSpec):
    """A tensor of a source: name, dtype and shape from the header, and the file that contains it."""

    file: str


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight that is already in 4 bit in the source and is adopted, not encoded.

    Codes may be stored in elements wider than bytes, and then be slightly longer than necessary.

    Attributes:
        layout: Shape, dtype and encoding options.
        state: Contents of its quant_state.
        parts: Its other components, which are read like any tensor.
    """

    layout: PackedShape
    state: QuantState
    parts: Mapping[Component, SourceTensor]

    @property
    def nbytes(self) -> int:
        """Size of the parts in bytes."""
        return sum(part.nbytes for part in self.parts.values())


class Source(Protocol):
    """A checkpoint that can be converted. Every problem with its files raises SourceError."""

    @property
    def kind(self) -> str:
        """Short name of the kind of source, as the manifest records it."""

    @property
    def location(self) -> Path:
        """Location of the source, for messages."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor except the components of `packed` weights, keyed by name."""

    @property
    def packed(self) -> Mapping[str, PackedWeight]:
        """Weights that are already in 4 bit, keyed by name. Most kinds of source have none."""

    @property
    def config(self) -> JsonObject:
        """Contents of the model's config.json."""

    @property
    def side_files(self) -> Mapping[str, int]:
        """Sizes in bytes of the files to carry over unmodified (tokenizer, licence, ...), keyed by name."""

    @property
    def state_when_opened(self) -> JsonObject:
        """State of each file just before it was first read, see `state`."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about the files, one sentence each."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Why files and directories are neither read nor carried over, keyed by name."""

    def describe(self) -> JsonObject:
        """Return what the manifest records about the source. Independent of its location."""

    def fingerprint(self) -> str:
        """Return a digest of everything that a plan depends on: headers, config and the bytes of side files."""

    def state(self) -> JsonObject:
        """Return a value (sizes, times) that stays equal as long as no file is changed. Cheap to compute."""

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of a tensor. Safe to call from several threads.

        Args:
            tensor: The tensor to read.
            offset: Offset of the first byte in the tensor.
            out: Buffer to fill.
        """

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""

    def close(self) -> None:
        """Close all open files."""
