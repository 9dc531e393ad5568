"""A source that decodes another one while it is read: what the fp8 and MXFP4 sources share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.source import PackedWeight, Source, SourceTensor


class DecodingSource:
    """The tensors of `stored` as they decode. A subclass says which they are and reads them.

    Whatever is not decoded passes through. Closing it closes `stored`.
    """

    kind = ""
    packed: Mapping[str, PackedWeight] = {}

    def __init__(self, stored: Source) -> None:
        self.stored = stored
        self.location: Path = stored.location
        self.side_files = stored.side_files
        self.state_when_opened = stored.state_when_opened
        self.config: JsonObject = {
            name: value for name, value in stored.config.items() if name != "quantization_config"
        }
        self.tensors: Mapping[str, SourceTensor] = stored.tensors

    def describe(self) -> JsonObject:
        """Return what is recorded of the stored source, under this kind, with the container that held it."""
        return {**self.stored.describe(), "kind": self.kind, "container": self.stored.kind}

    def fingerprint(self) -> str:
        """Return the stored source's fingerprint: it holds the config, and with it the encoding."""
        return f"{self.kind} {self.stored.fingerprint()}"

    def state(self) -> JsonObject:
        """Return the state of the stored files."""
        return self.stored.state()

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with stored bytes, for tensors that are not encoded."""
        self.stored.read_into(tensor, offset, out)

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""
        return self.stored.read_side_file(name)

    def close(self) -> None:
        """Close the stored source."""
        self.stored.close()

    def read_whole(self, tensor: SourceTensor) -> bytearray:
        """Return all bytes of a stored tensor."""
        data = bytearray(tensor.nbytes)
        self.stored.read_into(tensor, 0, memoryview(data))
        return data
