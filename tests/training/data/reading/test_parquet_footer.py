"""What a Parquet file states about its columns, with pyarrow as the oracle, which aborts for some damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qformat.errors import DataError
from qformat.training.data.reading.parquet_footer import RowGroup, read_row_groups
from qformat.training.data.reading.read_rows import BadRows, read_rows
from qformat.training.data.reading.sources import DataFile, FileKind
from qformat.training.data.reading.thrift import MAX_DEPTH, read_struct

TABLE: dict[str, list[Any]] = {
    "text": [str(number) * 20 for number in range(400)],
    "messages": [[{"role": "user", "content": "a" * (number % 7)}] for number in range(400)],
    "number": list(range(400)),
}


def written(path: Path, **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(TABLE), path, row_group_size=150, **options)
    return path


def row_groups(path: Path) -> list[RowGroup]:
    with path.open("rb") as file:
        return read_row_groups(file)


@pytest.mark.parametrize("version", ["1.0", "2.6"])
@pytest.mark.parametrize("compression", ["NONE", "zstd"])
@pytest.mark.parametrize("use_dictionary", [False, True])
def test_the_sizes_are_those_that_pyarrow_reads(
    version: str, compression: str, use_dictionary: bool, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.parquet", version=version, compression=compression, use_dictionary=use_dictionary)
    with pyarrow.parquet.ParquetFile(path) as parquet:
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        found = row_groups(path)
        assert [group.n_rows for group in found] == [group.num_rows for group in groups]
        for group, theirs in zip(found, groups, strict=True):
            columns = [theirs.column(index) for index in range(theirs.num_columns)]
            for chunk, column in zip(group.chunks, columns, strict=True):
                assert chunk.column == column.path_in_schema.partition(".")[0]
                assert chunk.nbytes == column.total_uncompressed_size
                assert chunk.stored_nbytes == column.total_compressed_size
                assert (chunk.dictionary_nbytes > 0) == column.has_dictionary_page


def test_the_size_of_a_dictionary_is_that_of_its_values(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 5000, "b"] * 500}), path, compression="zstd")
    ((chunk,),) = [group.chunks for group in row_groups(path)]
    assert chunk.dictionary_nbytes == 5000 + 1 + 2 * 4  # each value after its length in 4 bytes


def rows_or_an_error(path: Path) -> None:
    try:
        list(read_rows([DataFile(path, FileKind.PARQUET)], BadRows(skip=True)))
    except DataError as error:
        assert path.name in str(error)


@pytest.mark.parametrize("change", [0x10, *(pytest.param(1 << bit, marks=pytest.mark.slow) for bit in (0, 1, 2, 5, 7))])
def test_a_changed_byte_of_the_footer_gives_rows_or_an_error(change: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "tools": ["b"]}), path, compression="NONE")
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # Behind the descriptions, the footer holds the schema of Arrow as text.
    for position in range(start, data.index(b"ARROW:schema")):
        path.write_bytes(data[:position] + bytes([data[position] ^ change]) + data[position + 1 :])
        rows_or_an_error(path)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "ends early"),
        (b"\x15", "ends early"),
        (b"\x15" + b"\xff" * 11, "too long"),
        (b"\x1e\x00", "unknown type 14"),
        (b"\x18\xff\xff\x03a\x00", "ends early"),
        (b"\x1c" * (MAX_DEPTH + 2), "nested"),
        (b"\x19" + b"\x19" * (MAX_DEPTH + 2), "nested"),
        (b"\x19\xf1\xff\xff\xff\xff\x07" + b"\x01" * 64, "ends early"),
    ],
)
def test_bytes_that_are_no_struct_are_refused(data: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_struct(data)


def test_every_type_of_value_is_read() -> None:
    data = b"\x11\x12\x15\x03\x18\x02ab\x19\x21\x01\x02\x17" + b"8 bytes." + b"\x1c\x16\x04\x00\x1b\x01\x55\x02\x02\x00"
    assert read_struct(data) == {
        1: True, 2: False, 3: -2, 4: b"ab", 5: [True, False], 6: b"8 bytes.", 7: {1: 2}, 8: None,
    }  # fmt: skip


def test_what_follows_the_last_wanted_field_is_not_read() -> None:
    assert read_struct(b"\x15\x04\x15\x06\xff", last=2) == {1: 2, 2: 3}
