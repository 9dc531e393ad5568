"""Reads the sizes that a Parquet file states about its columns, before Arrow reads or decompresses any of them.

Source: the Thrift definition of Apache Parquet. The numbers of fields are those of the structs FileMetaData, RowGroup,
ColumnChunk, ColumnMetaData and PageHeader.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import TypeVar

from qformat.training.data.reading.thrift import Struct, Value, read_struct

MAX_FOOTER_NBYTES = 16 * 2**20
_TAIL_NBYTES = 8
_MAGIC = b"PAR1"
_DICTIONARY_PAGE = 2
_SIZE_OF_PAGE = 2
"""Number of the field with the size of a page after decompression."""

_PAGE_HEADER_NBYTES = 32
"""Enough for the first two fields of a page's header."""

_Kind = TypeVar("_Kind", int, bytes, list[Value], Struct)


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """The values of a column in a row group.

    Attributes:
        column: Name of the column; that of the outermost one if columns are nested.
        nbytes: Size in bytes after decompression.
        stored_nbytes: Size in bytes in the file.
        dictionary_nbytes: Size in bytes after decompression of the dictionary, in which any value may lie. 0 if there
            is none.
    """

    column: str
    nbytes: int
    stored_nbytes: int
    dictionary_nbytes: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A part of the rows.

    Attributes:
        n_rows: Number of rows.
        chunks: The columns.
    """

    n_rows: int
    chunks: tuple[ColumnChunk, ...]


def read_row_groups(file: BufferedReader) -> list[RowGroup]:
    """Return what a Parquet file states about its row groups.

    Args:
        file: The open file.

    Raises:
        ValueError: The file is damaged, encrypted or not a Parquet file.
        OSError: The file cannot be read.
    """
    nbytes = os.fstat(file.fileno()).st_size
    tail = os.pread(file.fileno(), _TAIL_NBYTES, max(0, nbytes - _TAIL_NBYTES))
    footer_nbytes = int.from_bytes(tail[:4], "little")
    start = nbytes - _TAIL_NBYTES - footer_nbytes
    if tail[4:] != _MAGIC or start < len(_MAGIC):
        raise ValueError("it does not end with the footer of a Parquet file")
    if footer_nbytes > MAX_FOOTER_NBYTES:
        raise ValueError(f"its footer has {footer_nbytes:,} bytes, and the limit is {MAX_FOOTER_NBYTES:,}")
    footer = read_struct(os.pread(file.fileno(), footer_nbytes, start))
    return [
        RowGroup(_field(group, 3, int), tuple(_chunk(file, chunk) for chunk in _structs(group, 1)))
        for group in _structs(footer, 4)
    ]


def _chunk(file: BufferedReader, chunk: Struct) -> ColumnChunk:
    facts = _field(chunk, 3, dict)
    path = _field(facts, 3, list)
    name = path[0] if path else None
    if not isinstance(name, bytes):
        raise ValueError("a column has no name")
    return ColumnChunk(
        name.decode("utf-8"), _field(facts, 6, int), _field(facts, 7, int), _dictionary_nbytes(file, facts)
    )


def _dictionary_nbytes(file: BufferedReader, facts: Struct) -> int:
    """Return the size of the dictionary, which is the first page of a column that has one."""
    start, stated = _field(facts, 9, int), facts.get(11)
    if isinstance(stated, int) and 0 < stated < start:
        start = stated
    if not 0 <= start < 2**63:
        raise ValueError("a column has no valid offset")
    page = read_struct(os.pread(file.fileno(), _PAGE_HEADER_NBYTES, start), last=_SIZE_OF_PAGE)
    return _field(page, _SIZE_OF_PAGE, int) if page.get(1) == _DICTIONARY_PAGE else 0


def _structs(fields: Struct, number: int) -> Iterator[Struct]:
    for entry in _field(fields, number, list):
        if not isinstance(entry, dict):
            raise ValueError("a description has a value of the wrong type")
        yield entry


def _field(fields: Struct, number: int, kind: type[_Kind]) -> _Kind:
    value = fields.get(number)
    if not isinstance(value, kind):
        raise ValueError("a description lacks a value, or has one of the wrong type")
    return value
