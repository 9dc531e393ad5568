"""Reads the header of a GGUF file strictly: every count, size and offset is checked before it is used.

gguf-py's own reader maps whatever a file claims and fails without saying what is wrong. Format: ggml's `docs/gguf.md`,
versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.limits import MAX_NAME_NBYTES
from qformat.artifact.reading.regular_files import read_exactly
from qformat.codec.foreign.ggml_types import BLOCK_TYPES, UNREAD_TYPES, BlockType
from qformat.errors import Reason, SourceError

_MAX_KEYS = 4096
_MAX_TENSORS = 100_000
_MAX_STRING_NBYTES = 4 * 2**20
_MAX_ARRAY_LENGTH = 2**22
_LONGEST_KEPT_ARRAY = 1024
_MAX_DIMENSIONS = 4
_MAX_SIZE = 2**48
_BUFFER_NBYTES = 2**20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = "general.alignment"

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata. The values of a long one, such as a vocabulary, are not kept."""

    length: int
    values: tuple[Scalar, ...] | None


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: Name of the tensor.
        block_type: How its values are stored.
        shape: Shape with the contiguous dimension last, unlike in GGUF itself.
        start: Offset in bytes of its data in the file.
        file: Name of the file.
    """

    name: str
    block_type: BlockType
    shape: tuple[int, ...]
    start: int
    file: str

    @property
    def nbytes(self) -> int:
        """Size in bytes in the file."""
        return math.prod(self.shape) // self.block_type.block_size * self.block_type.block_nbytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a model: metadata and tensors, each keyed by name, and the size in bytes of each file."""

    metadata: Mapping[str, Scalar | GgufArray]
    tensors: Mapping[str, GgufTensor]
    files: Mapping[str, int]


def read_header(descriptor: int, path: Path) -> GgufHeader:
    """Read the header of an open file and check all of it.

    Args:
        descriptor: Descriptor of the open file.
        path: Path of the file, for messages.

    Raises:
        SourceError: The header is damaged, exceeds a limit, or uses something that is not supported.
    """
    cursor = _Cursor(descriptor, path)
    if cursor.take(4) != b"GGUF":
        raise SourceError(Reason.HEADER_SYNTAX, path, "does not begin with GGUF")
    version = cursor.integer("I")
    if version not in {2, 3}:
        big = version in {2 << 24, 3 << 24}
        problem = "is big-endian" if big else f"GGUF version {version} is not supported, expected 2 or 3"
        raise SourceError(Reason.UNSUPPORTED_VERSION, path, problem)
    n_tensors, n_keys = cursor.count("tensors", _MAX_TENSORS), cursor.count("keys", _MAX_KEYS)
    metadata: dict[str, Scalar | GgufArray] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise SourceError(Reason.JSON_DUPLICATE_KEY, path, "occurs twice", field=key)
        kind = cursor.integer("I")
        if key == _ALIGNMENT and kind != _UINT32:
            raise SourceError(Reason.ALIGNMENT, path, f"has the type {kind}, expected {_UINT32} (uint32)", field=key)
        metadata[key] = cursor.value(kind, key)
    infos = [_read_info(cursor, path) for _ in range(n_tensors)]
    alignment = metadata.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise SourceError(Reason.ALIGNMENT, path, f"{alignment!r}, expected a power of two", field=_ALIGNMENT)
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, block_type, shape, offset in infos:
        if name in tensors:
            raise SourceError(Reason.DUPLICATE_TENSOR, path, "occurs twice", tensor=name)
        if offset % alignment:
            raise SourceError(Reason.ALIGNMENT, path, f"offset {offset} is not a multiple of {alignment}", tensor=name)
        tensors[name] = GgufTensor(name, block_type, shape, data_start + offset, path.name)
    _check_places(tensors, path, cursor.file_nbytes)
    return GgufHeader(metadata, tensors, {path.name: cursor.file_nbytes})


def _read_info(cursor: _Cursor, path: Path) -> tuple[str, BlockType, tuple[int, ...], int]:
    name = cursor.string()
    if not name or len(name.encode("utf-8")) > MAX_NAME_NBYTES or not name.isprintable():
        raise SourceError(Reason.HEADER_LIMIT, path, f"{name[:80]!r} is not a valid tensor name")
    n_dimensions = cursor.integer("I")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise SourceError(Reason.HEADER_LIMIT, path, f"{n_dimensions} dimensions, expected 1 to 4", tensor=name)
    shape = tuple(reversed([cursor.integer("Q") for _ in range(n_dimensions)]))
    if min(shape) < 1 or math.prod(shape) > _MAX_SIZE:
        problem = f"shape {list(shape)}, expected 1 to {_MAX_SIZE} elements"
        raise SourceError(Reason.HEADER_LIMIT, path, problem, tensor=name)
    number = cursor.integer("I")
    if number not in BLOCK_TYPES:
        known = ", ".join(block_type.name for block_type in BLOCK_TYPES.values())
        kind = UNREAD_TYPES.get(number, number)
        raise SourceError(
            Reason.UNSUPPORTED_DTYPE, path, f"ggml type {kind} is not supported (supported: {known})", tensor=name,
            next_step="Use a GGUF file of one of these types, for example F16 or Q8_0",
        )  # fmt: skip
    block_type = BLOCK_TYPES[number]
    if shape[-1] % block_type.block_size:
        raise SourceError(
            Reason.HEADER_FIELD, path,
            f"rows of {shape[-1]} elements, expected a multiple of {block_type.block_size} for {block_type.name}",
            tensor=name,
        )  # fmt: skip
    offset = cursor.integer("Q")
    if offset > _MAX_SIZE:
        raise SourceError(Reason.HEADER_OFFSETS, path, f"offset {offset} exceeds the limit of {_MAX_SIZE}", tensor=name)
    return name, block_type, shape, offset


def _check_places(tensors: Mapping[str, GgufTensor], path: Path, file_nbytes: int) -> None:
    """Reject tensors that overlap or extend beyond the end of the file."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise SourceError(Reason.HEADER_OFFSETS, path, "overlaps another tensor", tensor=tensor.name)
        end = tensor.start + tensor.nbytes
        if end > file_nbytes:
            raise SourceError(
                Reason.TRUNCATED, path, f"ends at byte {end}, but the file has {file_nbytes} bytes", tensor=tensor.name,
                next_step="Fetch the file again",
            )  # fmt: skip


class _Cursor:
    """Reads a file from its beginning in buffers, and rejects reads beyond its end in advance."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.position = 0
        self.file_nbytes = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._path = path
        self._buffer = b""
        self._buffer_start = 0
        self._n_elements_left = _MAX_ARRAY_LENGTH

    def take(self, nbytes: int) -> bytes:
        end = self.position + nbytes
        if end > self.file_nbytes:
            raise SourceError(
                Reason.TRUNCATED, self._path, f"ends within its header, at byte {self.file_nbytes}",
                next_step="Fetch the file again",
            )  # fmt: skip
        if end > self._buffer_start + len(self._buffer):
            buffer = bytearray(min(max(nbytes, _BUFFER_NBYTES), self.file_nbytes - self.position))
            read_exactly(self._descriptor, self.position, memoryview(buffer), path=self._path, error=SourceError)
            self._buffer, self._buffer_start = bytes(buffer), self.position
        first = self.position - self._buffer_start
        self.position = end
        return self._buffer[first : first + nbytes]

    def integer(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def count(self, what: str, largest: int) -> int:
        value = self.integer("Q")
        if value > largest:
            raise SourceError(Reason.HEADER_LIMIT, self._path, f"{value} {what}, the limit is {largest}")
        return value

    def string(self) -> str:
        data = self.take(self.count("bytes in a string", _MAX_STRING_NBYTES))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            place = self.position - len(data) + error.start
            raise SourceError(Reason.HEADER_SYNTAX, self._path, f"is not valid UTF-8 at byte {place}") from None

    def value(self, kind: int, key: str) -> Scalar | GgufArray:
        if kind == _ARRAY:
            return self._array(self.integer("I"), key)
        return self._scalar(kind, key)

    def _scalar(self, kind: int, key: str) -> Scalar:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise SourceError(Reason.HEADER_FIELD, self._path, f"has a value of unknown type {kind}", field=key)
        code = "<" + _SCALARS[kind]
        value: Scalar = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def _array(self, kind: int, key: str) -> GgufArray:
        length = self.count(f"elements in {key!r}", self._n_elements_left)
        self._n_elements_left -= length
        if length <= _LONGEST_KEPT_ARRAY:
            return GgufArray(length, tuple(self._scalar(kind, key) for _ in range(length)))
        if kind == _STRING:
            for _ in range(length):
                self.take(self.count("bytes in a string", _MAX_STRING_NBYTES))
        elif kind in _SCALARS:
            nbytes = length * struct.calcsize("<" + _SCALARS[kind])
            for done in range(0, nbytes, _BUFFER_NBYTES):
                self.take(min(_BUFFER_NBYTES, nbytes - done))
        else:
            raise SourceError(Reason.HEADER_FIELD, self._path, f"has an array of unknown type {kind}", field=key)
        return GgufArray(length, None)
