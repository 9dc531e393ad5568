"""The safetensors header, read strictly and written deterministically (spec section 3).

Stricter than the safetensors library: no repeated name, no unknown field, no leading space, aligned elements.
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
"""Tensor data of an artifact's shard starts at a multiple of this many bytes."""

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorEntry(TensorSpec):
    """One tensor of a header; `start` and `stop` are byte offsets in the file, `nbytes` apart."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors by name, in the order of their data; the data fills [data_start, file_nbytes)."""

    path: Path
    data_start: int
    file_nbytes: int
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def build(tensors: Iterable[TensorSpec]) -> bytes:
    """Return the length prefix and header of a file that holds these tensors in this order without holes."""
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


def read(descriptor: int, path: Path, *, error: type[InvalidFileError]) -> Header:
    """Read and check the header of an open safetensors file. Raises `error` with a header_* or truncated reason."""

    def read_into(offset: int, out: memoryview) -> None:
        read_exactly(descriptor, offset, out, path=path, error=error)

    text = read_text(read_into, file_nbytes=(nbytes := os.fstat(descriptor).st_size), path=path, error=error)
    return parse(text, file_nbytes=nbytes, path=path, error=error)


def read_text(
    read_into: Callable[[int, memoryview], None], *, file_nbytes: int, path: Path, error: type[InvalidFileError]
) -> bytes:
    """Return the JSON bytes of a header, in two reads: of the length field and of the text.

    read_into: fills memory with the file's bytes from an offset on, wherever the file lies.
    """
    if file_nbytes < _LENGTH.size:
        raise error(Reason.TRUNCATED, path, f"{file_nbytes} bytes, shorter than a safetensors file's length field")
    prefix = bytearray(_LENGTH.size)
    read_into(0, memoryview(prefix))
    (nbytes,) = _LENGTH.unpack(prefix)
    if nbytes > MAX_HEADER_NBYTES:
        raise error(
            Reason.HEADER_LENGTH, path, f"header length {nbytes}, at most {MAX_HEADER_NBYTES} is read",
            next_step="This is no safetensors file, or its first bytes are damaged",
        )  # fmt: skip
    if nbytes > file_nbytes - _LENGTH.size:
        raise error(
            Reason.TRUNCATED, path, f"header length {nbytes}, but the file has only {file_nbytes} bytes",
            next_step="Fetch the file again",
        )  # fmt: skip
    text = bytearray(nbytes)
    read_into(_LENGTH.size, memoryview(text))
    return bytes(text)


def framed(text: bytes) -> bytes:
    """Return a header's text behind its length field, as a file begins."""
    return _LENGTH.pack(len(text)) + text


def parse(text: bytes, *, file_nbytes: int, path: Path, error: type[InvalidFileError]) -> Header:
    """Parse the JSON bytes of a header that follow the length field of a file of `file_nbytes`."""
    if not text.startswith(b"{"):
        raise error(Reason.HEADER_SYNTAX, path, "the header does not begin with '{'")
    record = strict_json.loads(text.rstrip(b" "), path=path, max_nbytes=MAX_HEADER_NBYTES, error=error)
    if not isinstance(record, dict):
        raise error(Reason.HEADER_SYNTAX, path, "the header is not a JSON object")
    metadata = record.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(Reason.HEADER_FIELD, path, "not an object of strings", field=_METADATA)
    if not record:
        raise error(Reason.HEADER_SYNTAX, path, "the header names no tensor")
    data_start = _LENGTH.size + len(text)
    entries = [_entry(name, value, data_start, path, error) for name, value in record.items()]
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
    name: str, value: strict_json.Json, data_start: int, path: Path, error: type[InvalidFileError]
) -> TensorEntry:
    def refuse(reason: Reason, problem: str, field: str | None = None) -> InvalidFileError:
        return error(reason, path, problem, tensor=name, field=field)

    if not name or not name.isprintable() or len(name.encode("utf-8", "replace")) > MAX_NAME_NBYTES:
        shown = name if len(name) < 80 else name[:77] + "..."
        raise error(
            Reason.HEADER_LIMIT,
            path,
            f"a name must have 1 to {MAX_NAME_NBYTES} printable characters",
            tensor=shown,
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(Reason.HEADER_FIELD, "must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_NBYTES:
        raise refuse(Reason.UNSUPPORTED_DTYPE, f"{dtype!r} is not a dtype that qformat reads", "dtype")
    if not isinstance(shape, list) or not _are_sizes(shape):
        raise refuse(Reason.HEADER_FIELD, f"not a list of sizes up to {MAX_SIZE}", "shape")
    if len(shape) > MAX_DIMENSIONS:
        raise refuse(Reason.HEADER_LIMIT, f"{len(shape)} dimensions, at most {MAX_DIMENSIONS} are read", "shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets):
        raise refuse(Reason.HEADER_FIELD, "not a pair of byte offsets", "data_offsets")
    sizes = tuple(shape)
    begin, end = offsets
    expected = data_nbytes(dtype, sizes)
    if end - begin != expected:
        raise refuse(
            Reason.HEADER_OFFSETS,
            f"[{begin}, {end}] has {end - begin} bytes, expected {expected} ({dtype} {list(sizes)})",
            "data_offsets",
        )
    if (data_start + begin) % ELEMENT_NBYTES[dtype]:
        raise refuse(Reason.ALIGNMENT, f"{dtype} data at byte {data_start + begin} of the file", "data_offsets")
    return TensorEntry(name, dtype, sizes, data_start + begin, data_start + end)


def _are_sizes(values: list[strict_json.Json]) -> TypeGuard[list[int]]:
    # A loop: a generator takes twice as long, and a header has thousands of these.
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            return False
    return True


def _check_coverage(
    entries: list[TensorEntry], data_start: int, file_nbytes: int, path: Path, error: type[InvalidFileError]
) -> None:
    """The entries, in the order of their data, must cover the data without holes or overlaps."""
    position = data_start
    for entry in entries:
        if entry.start != position:
            kind = "a hole" if entry.start > position else "an overlap"
            raise error(
                Reason.HEADER_OFFSETS,
                path,
                f"{kind}: data begins at {entry.start - data_start}, expected {position - data_start}",
                tensor=entry.name,
                field="data_offsets",
            )
        position = entry.stop
    if position > file_nbytes:
        raise error(
            Reason.TRUNCATED, path, f"{file_nbytes} bytes, expected {position}", tensor=entries[-1].name,
            next_step="Fetch the file again",
        )  # fmt: skip
    if position < file_nbytes:
        raise error(Reason.TRAILING_BYTES, path, f"{file_nbytes} bytes, expected {position}")
