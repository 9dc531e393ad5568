"""Parquet files with large rows or pages: refused from a few numbers of the file, before Arrow reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qformat.errors import DataError
from qformat.training.data.place import MAX_ROW_NBYTES
from qformat.training.data.reading import columns
from qformat.training.data.reading.read_rows import BadRows, read_rows
from qformat.training.data.reading.sources import DataFile, FileKind, find_files
from qformat.training.data.rows import ChatRow, TextRow

LIMIT = 10_000


def write(path: Path, table: dict[str, list[Any]], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(table), path, compression="zstd", **options)
    return path


def read(path: Path, *, skip: bool | None = None, limit: int = LIMIT) -> tuple[list[Any], BadRows]:
    bad = BadRows(skip=skip)
    return [row.content for row in read_rows(find_files(path), bad, max_row_nbytes=limit)], bad


def no_pages(*_: Any, **__: Any) -> None:
    raise AssertionError("a page was read")


def incompressible(n: int, *, seed: int = 0) -> str:
    return random.Random(seed).randbytes(n // 2 + 1).hex()[:n]


def test_one_row_beyond_the_limit_is_refused_before_its_page_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.parquet", {"text": ["a" * (MAX_ROW_NBYTES + 1)]})
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", no_pages)
    with pytest.raises(
        DataError, match=r"rows of its row group 1 have 16\.\d MB each on average\. The limit"
    ) as caught:
        read(path, limit=MAX_ROW_NBYTES)
    assert caught.value.reason == "too_large"


def test_a_page_that_decompresses_to_far_more_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.parquet", {"text": ["a" * 9_000 + str(number) for number in range(1000)]})
    monkeypatch.setattr(columns, "_MAX_NBYTES_AT_ANY_RATIO", 2**20)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", no_pages)
    with pytest.raises(DataError, match=r"grow from [\d,]+ to 9,[\d,]+ bytes in memory"):
        read(path)


def test_a_large_row_among_small_ones_is_refused_with_its_number_or_skipped(tmp_path: Path) -> None:
    rows = ["one", incompressible(LIMIT - 100), incompressible(LIMIT + 1), "two"]
    path = write(tmp_path / "rows.parquet", {"text": rows})
    with pytest.raises(
        DataError, match=r"rows.parquet: row 3: is longer than 10,000 bytes, the limit of a row"
    ) as caught:
        read(path)
    assert caught.value.reason == "too_large"
    found, bad = read(path, skip=True)
    assert found == [TextRow(rows[0]), TextRow(rows[1]), TextRow(rows[3])]
    assert dict(bad.counts) == {"too_large": 1}


def test_the_size_of_a_conversation_counts_all_its_turns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": incompressible(1000, seed=number)} for number in range(11)]
    path = write(tmp_path / "rows.parquet", {"messages": [turns[:9], turns]})
    found, bad = read(path, skip=True)
    assert len(found) == 1
    assert isinstance(found[0], ChatRow)
    assert dict(bad.counts) == {"too_large": 1}


@pytest.mark.parametrize("value_nbytes", [10, 200, 3_000, 9_000])
def test_a_value_repeated_through_a_dictionary_is_expanded_for_a_few_rows_at_a_time(
    value_nbytes: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.parquet", {"text": ["a" * value_nbytes] * 100})
    batches = list(columns.record_batches(DataFile(path, FileKind.PARQUET), LIMIT))
    assert sum(batch.num_rows for batch in batches) == 100
    assert max(batch.num_rows for batch in batches) == max(1, min(16, LIMIT // (value_nbytes + 4)))


def test_large_columns_without_training_data_are_not_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", {"text": ["a"], "image": ["b" * 100_000]})
    assert read(path)[0] == [TextRow("a")]


def test_a_file_without_a_known_column_is_refused_without_reading_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.parquet", {"image": ["b" * 100_000]})
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", no_pages)
    with pytest.raises(DataError, match=r"has no column 'messages'.*found 'image'"):
        read(path)


def test_every_row_group_is_read_in_order(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(70)]
    path = write(tmp_path / "rows.parquet", {"text": rows}, row_group_size=33)
    assert read(path)[0] == [TextRow(row) for row in rows]
