"""A source that decodes another one while it is read; shared by the FP8, MXFP4 and bitsandbytes sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.source import PackedWeight, Source, SourceTensor
from qformat.errors import Reason, SourceError
from qformat.names import CONFIG_NAME

_Encoded = TypeVar("_Encoded")
"""How a subclass describes the stored form of a tensor that it decodes."""


class DecodingSource:
    """Decoded view of another source, `stored`. A subclass lists the decoded tensors and reads them.

    Everything else passes through. Closing it closes `stored`.
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

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about the stored files."""
        return self.stored.notes

    @property
    def left_out(self) -> Mapping[str, str]:
        """Why files of the stored source are neither read nor carried over, keyed by name."""
        return self.stored.left_out

    def describe(self) -> JsonObject:
        """Return the manifest's record of the stored source under this kind, with the stored kind as the container."""
        return {**self.stored.describe(), "kind": self.kind, "container": self.stored.kind}

    def fingerprint(self) -> str:
        """Return the stored source's fingerprint, which covers the config and thereby the encoding."""
        return f"{self.kind} {self.stored.fingerprint()}"

    def state(self) -> JsonObject:
        """Return the state of the stored files."""
        return self.stored.state()

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with stored bytes of a tensor that is not encoded.

        Args:
            tensor: The tensor to read.
            offset: Offset of the first byte in the tensor.
            out: Buffer to fill.
        """
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


class BlockFloats(DecodingSource, ABC, Generic[_Encoded]):
    """Tensors that are stored as codes and block scales and read as bfloat16."""

    def _decode(self, encoded: Mapping[str, _Encoded], tensors: Mapping[str, SourceTensor], *, mark: str) -> None:
        """Set the encoded tensors and all tensors of the decoded model. Raises SourceError if nothing is encoded.

        mark: completes the message "but no ..." with what an encoded tensor looks like.
        """
        if not encoded:
            path, problem = self.location / CONFIG_NAME, f"is for {self.kind}, but no {mark}"
            raise SourceError(Reason.CONFIG_FIELD, path, problem, field="quantization_config")
        self._encoded = encoded
        self.tensors = tensors

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of a decoded tensor.

        Args:
            tensor: The tensor to read.
            offset: Offset of the first byte in the decoded tensor, at an element boundary.
            out: Buffer to fill.
        """
        encoded = self._encoded.get(tensor.name)
        if encoded is None:
            self.stored.read_into(tensor, offset, out)
        else:
            self._decode_into(encoded, offset // 2, np.frombuffer(out, np.uint16))

    @abstractmethod
    def _decode_into(self, encoded: _Encoded, start: int, out: NDArray[np.uint16]) -> None:
        """Fill `out` with the bits of bfloat16 elements, beginning at element `start`."""


def refuse_dtype(stored: Source, tensor: SourceTensor, allowed: Collection[str]) -> None:
    """Reject codes or scales whose dtype is not allowed.

    Args:
        stored: The stored source, for the message.
        tensor: The codes or scales.
        allowed: Dtypes that are allowed.

    Raises:
        SourceError: The dtype is not allowed.
    """
    if tensor.dtype not in allowed:
        expected = next(iter(allowed)) if len(allowed) == 1 else f"one of {', '.join(sorted(allowed))}"
        raise SourceError(
            Reason.COMPONENT_DTYPE,
            stored.location / tensor.file,
            f"dtype {tensor.dtype}, expected {expected}",
            tensor=tensor.name,
        )
