"""Strict reading and deterministic writing of safetensors headers (spec section 3).

The reader is stricter than the safetensors library: it also rejects repeated names, and in a shard of an artifact
unknown fields, leading spaces and misaligned elements.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from qformat import strict_json
from qformat.artifact.limits import MAX_DIMENSIONS, MAX_HEADER_NBYTES, MAX_NAME_NBYTES, MAX_SIZE
from qformat.artifact.reading.regular_files import read_exactly
from qformat.artifact.tensor_spec import ELEMENT_NBYTES, TensorSpec, data_nbytes
from qformat.errors import InvalidFileError, Reason

DATA_ALIGNMENT = 4096
"""Alignment of the first byte of tensor data in a shard of an artifact, in bytes."""

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry(TensorSpec):
    """Entry of one tensor in a header.

    Attributes:
        start: Offset of the first byte of its data in the file.
        stop: Offset after the last byte of its data in the file.
    """

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a safetensors file, parsed and checked.

    Attributes:
        path: Path of the file.
        data_start: Offset of the first byte after the header.
        file_nbytes: Size of the file in bytes; the data of the tensors ends there.
        tensors: Entries by name, in the order of their data.
        metadata: Strings of `__metadata__`.
    """

    path: Path
    data_start: int
    file_nbytes: int
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def build(tensors: Iterable[TensorSpec]) -> bytes:
    """Return the length field and the header of a file that contains these tensors in this order, without gaps."""
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = strict_json.dumps(entries).encode("utf-8")
    padded = -(-(_LENGTH.size + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - _LENGTH.size
    return _LENGTH.pack(padded) + text.ljust(padded, b" ")


def read(descriptor: int, path: Path, *, error: type[InvalidFileError], of_artifact: bool = True) -> Header:
    """Read and check the header of an open safetensors file.

    Args:
        descriptor: File descriptor.
        path: Path of the file, for error messages.
        error: Class of the error to raise.
        of_artifact: Whether the file is a shard of an artifact, see `parse`.

    Raises:
        InvalidFileError: The header is invalid (spec section 3.1). The class is `error`.
    """

    def read_into(offset: int, out: memoryview) -> None:
        read_exactly(descriptor, offset, out, path=path, error=error)

    text = read_text(read_into, file_nbytes=(nbytes := os.fstat(descriptor).st_size), path=path, error=error)
    return parse(text, file_nbytes=nbytes, path=path, error=error, of_artifact=of_artifact)


def read_text(
    read_into: Callable[[int, memoryview], None], *, file_nbytes: int, path: Path, error: type[InvalidFileError]
) -> bytes:
    """Return the JSON text of a header. The length field and the text are read separately.

    Args:
        read_into: Function that fills a buffer with the bytes of the file from an offset on. The file may be remote.
        file_nbytes: Size of the file in bytes.
        path: Path of the file, for error messages.
        error: Class of the error to raise.

    Raises:
        InvalidFileError: The length field is too large or the file too short (header_length, truncated). The class is
            `error`.
    """
    if file_nbytes < _LENGTH.size:
        raise error(
            Reason.TRUNCATED, path,
            f"the file has {file_nbytes} bytes, but the length field of a safetensors file alone has {_LENGTH.size}",
        )  # fmt: skip
    prefix = bytearray(_LENGTH.size)
    read_into(0, memoryview(prefix))
    (nbytes,) = _LENGTH.unpack(prefix)
    if nbytes > MAX_HEADER_NBYTES:
        raise error(
            Reason.HEADER_LENGTH, path, f"the header length is {nbytes} bytes (the limit is {MAX_HEADER_NBYTES})",
            next_step="This is not a safetensors file, or its first bytes are damaged",
        )  # fmt: skip
    if nbytes > file_nbytes - _LENGTH.size:
        raise error(
            Reason.TRUNCATED, path, f"the header length is {nbytes} bytes, but the file has only {file_nbytes} bytes",
            next_step="Fetch the file again",
        )  # fmt: skip
    text = bytearray(nbytes)
    read_into(_LENGTH.size, memoryview(text))
    return bytes(text)


def framed(text: bytes) -> bytes:
    """Return the length field of a header followed by its text: the beginning of a file."""
    return _LENGTH.pack(len(text)) + text


def parse(
    text: bytes, *, file_nbytes: int, path: Path, error: type[InvalidFileError], of_artifact: bool = True
) -> Header:
    """Parse and check the JSON text of a header.

    Args:
        text: Bytes between the length field and the data.
        file_nbytes: Size of the file in bytes.
        path: Path of the file, for error messages.
        error: Class of the error to raise.
        of_artifact: Whether the file is a shard of an artifact. Any other file may have misaligned elements, no tensor,
            unknown fields, spaces before the text and a `__metadata__` of null, which the safetensors library reads.

    Raises:
        InvalidFileError: The header is invalid (spec section 3.1). The class is `error`.
    """
    if not (text if of_artifact else text.lstrip(b" \t\r\n")).startswith(b"{"):
        raise error(Reason.HEADER_SYNTAX, path, "the header does not begin with '{'")
    record = strict_json.loads(text.rstrip(b" "), path=path, max_nbytes=MAX_HEADER_NBYTES, error=error)
    if not isinstance(record, dict):
        raise error(Reason.HEADER_SYNTAX, path, "the header is not a JSON object")
    metadata = record.pop(_METADATA, {})
    if metadata is None and not of_artifact:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(Reason.HEADER_FIELD, path, "is not an object of strings", field=_METADATA)
    if not record and of_artifact:
        raise error(Reason.HEADER_SYNTAX, path, "the header contains no tensor")
    data_start = _LENGTH.size + len(text)
    entries = [_entry(name, value, data_start, path, error, of_artifact) for name, value in record.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_coverage(entries, data_start, file_nbytes, path, error)
    return Header(
        path=path,
        data_start=data_start,
        file_nbytes=file_nbytes,
        tensors={entry.name: entry for entry in entries},
        metadata={key: str(value) for key, value in metadata.items()},
    )


def _entry(
    name: str,
    value: strict_json.Json,
    data_start: int,
    path: Path,
    error: type[InvalidFileError],
    of_artifact: bool,
) -> TensorEntry:
    def refuse(reason: Reason, problem: str, field: str | None = None) -> InvalidFileError:
        return error(reason, path, problem, tensor=name, field=field)

    if not name or not name.isprintable() or len(name.encode("utf-8", "replace")) > MAX_NAME_NBYTES:
        shown = name if len(name) < 80 else name[:77] + "..."
        raise error(
            Reason.HEADER_LIMIT,
            path,
            f"the name must have 1 to {MAX_NAME_NBYTES} bytes of printable characters",
            tensor=shown,
        )
    if not isinstance(value, dict) or (value.keys() != _FIELDS if of_artifact else not value.keys() >= _FIELDS):
        exactly = "exactly " if of_artifact else ""
        raise refuse(Reason.HEADER_FIELD, f"must have {exactly}the fields dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_NBYTES:
        raise refuse(Reason.UNSUPPORTED_DTYPE, f"the dtype {dtype!r} is not supported", "dtype")
    if not isinstance(shape, list) or not _are_sizes(shape):
        raise refuse(Reason.HEADER_FIELD, f"is not a list of integers from 0 to {MAX_SIZE}", "shape")
    if len(shape) > MAX_DIMENSIONS:
        raise refuse(Reason.HEADER_LIMIT, f"has {len(shape)} dimensions (the limit is {MAX_DIMENSIONS})", "shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets):
        raise refuse(Reason.HEADER_FIELD, "is not a pair of byte offsets", "data_offsets")
    sizes = tuple(shape)
    begin, end = offsets
    expected = data_nbytes(dtype, sizes)
    if end - begin != expected:
        raise refuse(
            Reason.HEADER_OFFSETS,
            f"[{begin}, {end}] has {end - begin} bytes, expected {expected} ({dtype} {list(sizes)})",
            "data_offsets",
        )
    if of_artifact and (data_start + begin) % ELEMENT_NBYTES[dtype]:
        raise refuse(
            Reason.ALIGNMENT,
            f"the data begins at byte {data_start + begin} of the file, not a multiple of {ELEMENT_NBYTES[dtype]}",
            "data_offsets",
        )
    return TensorEntry(name, dtype, sizes, data_start + begin, data_start + end)


def _are_sizes(values: list[strict_json.Json]) -> TypeGuard[list[int]]:
    # A generator takes twice as long as this loop, and a header has thousands of these lists.
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            return False
    return True


def _check_coverage(
    entries: list[TensorEntry], data_start: int, file_nbytes: int, path: Path, error: type[InvalidFileError]
) -> None:
    """Reject entries, given in the order of their data, that leave gaps or overlap."""
    position = data_start
    for entry in entries:
        if entry.start != position:
            kind = "a gap" if entry.start > position else "an overlap"
            raise error(
                Reason.HEADER_OFFSETS,
                path,
                f"there is {kind}: the data begins at {entry.start - data_start}, expected {position - data_start}",
                tensor=entry.name,
                field="data_offsets",
            )
        position = entry.stop
    if position > file_nbytes:
        raise error(
            Reason.TRUNCATED, path, f"the file has {file_nbytes} bytes, expected {position}", tensor=entries[-1].name,
            next_step="Fetch the file again",
        )  # fmt: skip
    if position < file_nbytes:
        raise error(Reason.TRAILING_BYTES, path, f"the file has {file_nbytes} bytes, expected {position}")
