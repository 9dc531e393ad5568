"""Reads Parquet and Arrow files in small batches of rows, whose memory a few numbers of the file limit beforehand.

A Parquet file of some hundred bytes can stand for a terabyte: a page is decompressed as a whole, and a value in the
dictionary of a column may be repeated in every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader
from typing import TYPE_CHECKING

from qformat.errors import DataError, first_line
from qformat.named_files import open_named
from qformat.sizes import format_nbytes
from qformat.training.data.place import BadRow
from qformat.training.data.reading.parquet_footer import ColumnChunk, read_row_groups
from qformat.training.data.reading.sources import DataFile, FileKind
from qformat.training.data.rows import FIELDS

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_ROWS_AT_A_TIME = 16
_BUFFER_NBYTES = 2**20

_MAX_RATIO = 200
"""Largest ratio of decompressed to stored bytes. Text that people write compresses by 3 to 20."""

_MAX_NBYTES_AT_ANY_RATIO = 32 * 2**20


def record_batches(file: DataFile, max_row_nbytes: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of a file with columns.

    Args:
        file: Parquet file or Arrow stream.
        max_row_nbytes: Largest size of a row in bytes. A row beyond it may still be yielded.

    Raises:
        DataError: The file is damaged, or its rows are too large on average.
    """
    import pyarrow

    try:
        with open_named(file.path) as opened:
            yield from _parquet(file, opened, max_row_nbytes) if file.kind is FileKind.PARQUET else _arrow_stream(file)
    except (pyarrow.ArrowException, OSError, ValueError) as problem:  # ValueError: names of columns that are not UTF-8
        raise DataError(
            BadRow.DAMAGED_FILE,
            file.path,
            f"cannot be read as {file.kind.value}: {first_line(problem)}",
            place=None,
            next_step="Download or write the file again",
        ) from problem


def _arrow_stream(file: DataFile) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    with pyarrow.memory_map(str(file.path)) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
        _ = batches.schema.names  # raises ValueError here if a name is not UTF-8
        for batch in batches:
            # Arrow does not check the offsets in its files: a damaged one would crash the process.
            batch.validate(full=True)
            for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                yield batch.slice(start, _ROWS_AT_A_TIME)


def _parquet(file: DataFile, opened: BufferedReader, max_row_nbytes: int) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow
    import pyarrow.parquet

    # Without pre_buffer=False, Arrow would read the columns of several row groups at once.
    with pyarrow.parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=_BUFFER_NBYTES) as parquet:
        # Select the columns: otherwise a column of images would be read as well.
        names = [name for name in parquet.schema_arrow.names if name in FIELDS]
        if not names:
            yield pyarrow.RecordBatch.from_pylist([], schema=parquet.schema_arrow)
            return
        for number, group in enumerate(read_row_groups(opened)):
            chunks = [chunk for chunk in group.chunks if chunk.column in names]
            _check_sizes(file, number + 1, chunks, group.n_rows, max_row_nbytes)
            # Any value of a column may be one of its dictionary, which is small in the file however often it occurs.
            largest = max((chunk.dictionary_nbytes for chunk in chunks), default=0)
            n_rows = max(1, min(_ROWS_AT_A_TIME, max_row_nbytes // max(1, largest)))
            yield from parquet.iter_batches(n_rows, row_groups=[number], columns=names)


def _check_sizes(file: DataFile, number: int, chunks: list[ColumnChunk], n_rows: int, max_row_nbytes: int) -> None:
    """Check what a row group needs in memory before Arrow reads its pages."""
    nbytes, stored = sum(chunk.nbytes for chunk in chunks), sum(chunk.stored_nbytes for chunk in chunks)
    if nbytes > max_row_nbytes * max(1, n_rows):
        raise _too_large(
            file, number, f"have {format_nbytes(nbytes // max(1, n_rows))} each on average", max_row_nbytes
        )
    if nbytes > max(_MAX_NBYTES_AT_ANY_RATIO, _MAX_RATIO * stored):
        raise _too_large(file, number, f"grow from {stored:,} to {nbytes:,} bytes in memory", max_row_nbytes)


def _too_large(file: DataFile, number: int, problem: str, max_row_nbytes: int) -> DataError:
    return DataError(
        BadRow.TOO_LARGE,
        file.path,
        f"the rows of its row group {number} {problem}. The limit of a row is {max_row_nbytes:,} bytes",
        place=None,
        next_step="Divide large rows into several, or write the data as JSON lines",
    )
