"""Streams rows from data files. Memory use does not grow with the size of a file."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qformat.errors import DataError, Option
from qformat.strict_json import Json
from qformat.training.data.place import MAX_ROW_NBYTES, BadRow, Place, refuse_large
from qformat.training.data.reading.columns import record_batches
from qformat.training.data.reading.json_arrays import array_entries, is_array
from qformat.training.data.reading.sources import DataFile, FileKind
from qformat.training.data.rows import FIELDS, Row, parse_fields, parse_line

if TYPE_CHECKING:
    import pyarrow

_SKIP_NBYTES = 2**20

JSON_ARRAYS = "JSON arrays"
"""Name of the format of a file that holds all rows in one array."""


class BadRows:
    """Decides what happens with an unusable row: it raises an error, or is skipped and counted.

    Args:
        skip: Whether to skip unusable rows. None if the caller has no option for it, so that no error recommends one.
    """

    def __init__(self, *, skip: bool | None) -> None:
        self.counts: Counter[str] = Counter()
        self._skip = skip

    def refuse(self, error: DataError) -> None:
        """Raise the error of a row, or count it under its reason."""
        if self._skip is None:
            raise error
        if not self._skip:
            raise error.advising(", or skip unusable rows with ", Option("skip_bad_lines", True)) from None
        self.counts[error.reason] += 1


def read_rows(files: list[DataFile], bad: BadRows, *, max_row_nbytes: int = MAX_ROW_NBYTES) -> Iterator[Row]:
    """Yield the rows of all files in order.

    Args:
        files: Files to read.
        bad: Decides what happens with unusable rows.
        max_row_nbytes: Largest size of a row in bytes.

    Yields:
        The rows that can be used.

    Raises:
        DataError: A row cannot be used and `bad` does not skip it, or a file is damaged.
    """
    for file in files:
        if file.kind is FileKind.JSON and is_array(file.path):
            yield from _json_array(file.path, bad, max_row_nbytes)
        elif file.kind in (FileKind.JSON, FileKind.JSON_LINES):
            yield from _json_lines(file.path, bad, max_row_nbytes)
        else:
            yield from _columns(file, bad, max_row_nbytes)


def _json_lines(path: Path, bad: BadRows, max_row_nbytes: int) -> Iterator[Row]:
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(max_row_nbytes + 1):
            number += 1
            place = Place(path, "line", number)
            try:
                if len(line.rstrip(b"\r\n")) > max_row_nbytes or (len(line) > max_row_nbytes and line[-1:] != b"\n"):
                    while line and line[-1:] != b"\n":
                        line = lines.readline(_SKIP_NBYTES)
                    refuse_large(place, max_row_nbytes)
                row = parse_line(line.removeprefix(BOM_UTF8) if number == 1 else line, place)
            except DataError as error:
                bad.refuse(error)
            else:
                yield row


def _json_array(path: Path, bad: BadRows, max_row_nbytes: int) -> Iterator[Row]:
    for place, text in array_entries(path, max_row_nbytes):
        try:
            row = parse_line(text, place)
        except DataError as error:
            bad.refuse(error)
        else:
            found = JSON_ARRAYS if row.converted_from is None else f"{row.converted_from} in {JSON_ARRAYS}"
            yield replace(row, converted_from=found)


def _columns(file: DataFile, bad: BadRows, max_row_nbytes: int) -> Iterator[Row]:
    number = 0
    for batch in record_batches(file, max_row_nbytes):
        names = [name for name in FIELDS if name in batch.schema.names]
        if not names:
            raise DataError(
                BadRow.NO_KNOWN_FIELD,
                file.path,
                "has no column 'messages', 'prompt' and 'completion', 'text', 'conversations' or 'instruction' "
                f"(found {', '.join(map(repr, batch.schema.names[:8]))})",
                place=None,
                next_step="Rename its columns",
            )
        twice = [name for name in names if batch.schema.names.count(name) > 1]
        if twice:
            raise DataError(
                BadRow.DAMAGED_FILE,
                file.path,
                f"has the column {twice[0]!r} more than once",
                place=None,
                next_step="Rename or remove one of them",
            )
        wanted = batch.select(names)
        may_be_large = wanted.nbytes > max_row_nbytes
        for index in range(batch.num_rows):
            number += 1
            place = Place(file.path, "row", number)
            try:
                if may_be_large and wanted.slice(index, 1).nbytes > max_row_nbytes:
                    refuse_large(place, max_row_nbytes)
                row = parse_fields(_fields(wanted, index, place), place)
            except DataError as error:
                bad.refuse(error)
            else:
                yield row


def _fields(batch: pyarrow.RecordBatch, index: int, place: Place) -> dict[str, Json]:
    try:
        return {name: batch.column(position)[index].as_py() for position, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError as broken:
        place.refuse(BadRow.NOT_UTF8, f"has a string that is not valid UTF-8 (byte {broken.start})")
    except (ValueError, OverflowError) as problem:  # for example a date beyond the years that Python supports
        place.refuse(BadRow.WRONG_TYPE, f"has a value that Python cannot represent: {problem}")
