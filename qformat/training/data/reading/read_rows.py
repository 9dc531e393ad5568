"""Rows out of data files, as a stream: memory does not grow with the file."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qformat.errors import DataError
from qformat.strict_json import Json
from qformat.training.data.reading.rows import FIELDS, BadRow, Place, Row, parse_fields, parse_line
from qformat.training.data.reading.sources import DataFile, FileKind

if TYPE_CHECKING:
    import pyarrow

MAX_LINE_NBYTES = 16 * 2**20
"""Of one line: eight million words. A file without line ends must not be read into memory as one."""

_ROWS_AT_A_TIME = 1024
_SKIP_NBYTES = 2**20


class BadRows:
    """What happens with a row that cannot be used: it ends everything, or it is counted by its reason."""

    def __init__(self, *, skip: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._skip = skip

    def refuse(self, error: DataError) -> None:
        """Raise `error`, or count it."""
        if not self._skip:
            raise error
        self.counts[error.reason] += 1


def read_rows(files: list[DataFile], bad: BadRows, *, max_line_nbytes: int = MAX_LINE_NBYTES) -> Iterator[Row]:
    """Yield the rows of all files, in order. Raises DataError, unless `bad` skips; also for a damaged file."""
    for file in files:
        if file.kind is FileKind.JSON_LINES:
            yield from _json_lines(file.path, bad, max_line_nbytes)
        else:
            yield from _columns(file, bad)


def _json_lines(path: Path, bad: BadRows, max_line_nbytes: int) -> Iterator[Row]:
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(max_line_nbytes + 1):
            number += 1
            place = Place(path, "line", number)
            try:
                if len(line.rstrip(b"\r\n")) > max_line_nbytes or (len(line) > max_line_nbytes and line[-1:] != b"\n"):
                    while line and line[-1:] != b"\n":
                        line = lines.readline(_SKIP_NBYTES)
                    place.refuse(BadRow.TOO_LARGE, f"more than {max_line_nbytes} bytes, the limit for one line")
                row = parse_line(line.removeprefix(BOM_UTF8) if number == 1 else line, place)
            except DataError as error:
                bad.refuse(error)
            else:
                yield row


def _columns(file: DataFile, bad: BadRows) -> Iterator[Row]:
    number = 0
    for batch in _record_batches(file):
        names = [name for name in FIELDS if name in batch.schema.names]
        if not names:
            raise DataError(
                BadRow.NO_KNOWN_FIELD,
                file.path,
                f"has no column 'messages', 'prompt' and 'completion', or 'text', but {batch.schema.names[:8]}",
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
        for index in range(batch.num_rows):
            number += 1
            place = Place(file.path, "row", number)
            try:
                row = parse_fields(_fields(wanted, index, place), place)
            except DataError as error:
                bad.refuse(error)
            else:
                yield row


def _fields(batch: pyarrow.RecordBatch, index: int, place: Place) -> dict[str, Json]:
    try:
        return {name: batch.column(position)[index].as_py() for position, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError as broken:
        place.refuse(BadRow.NOT_UTF8, f"a string that is not UTF-8 at byte {broken.start}")
    except (ValueError, OverflowError) as problem:  # such as a date that Python has no year for
        place.refuse(BadRow.WRONG_TYPE, f"a value that Python cannot hold: {problem}")


def _record_batches(file: DataFile) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    import pyarrow.parquet

    try:
        if file.kind is FileKind.PARQUET:
            with pyarrow.parquet.ParquetFile(file.path) as parquet:
                # Without the projection, a column of images would be read as well.
                wanted = [name for name in parquet.schema_arrow.names if name in FIELDS]
                yield from parquet.iter_batches(_ROWS_AT_A_TIME, columns=wanted or None)
        else:
            with pyarrow.memory_map(str(file.path)) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
                for batch in batches:
                    # Arrow trusts the offsets of its files: a damaged one would end the process.
                    batch.validate(full=True)
                    for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                        yield batch.slice(start, _ROWS_AT_A_TIME)
    except (pyarrow.ArrowException, OSError) as problem:
        first = str(problem).partition("\n")[0]
        raise DataError(
            BadRow.DAMAGED_FILE,
            file.path,
            f"cannot be read as {file.kind.value}: {first}",
            place=None,
            next_step="Fetch or write the file again",
        ) from problem
