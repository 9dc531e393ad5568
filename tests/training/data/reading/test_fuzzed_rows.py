"""Any file of training data gives rows or an error that names it: JSON Lines, arrays, chats, Parquet and Arrow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

from qformat.errors import DataError
from qformat.training.data.reading.read_rows import BadRows, read_rows
from qformat.training.data.reading.sources import DataFile, FileKind
from qformat.training.data.rows import ChatRow, CompletionRow, Row, TextRow
from tests.corpus.damage.odd_json import odd_edit, odd_text
from tests.corpus.fuzzing import RANDOM, edited_bytes, fuzz, lengths

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
ROWS: list[dict[str, Any]] = [
    {"text": "a text"},
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "chat_template_kwargs": {"thinking": True},
    },
    {"messages": [{"role": "user", "content": "a"}], "tools": '[{"name": "f"}]'},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "", "output": "b"},
]


def rows_of(path: Path, kind: FileKind, *, skip: bool) -> list[Row]:
    """Read a file. Only a DataError that names it may be raised."""
    try:
        rows = list(read_rows([DataFile(path, kind)], BadRows(skip=skip), max_row_nbytes=10_000))
    except DataError as error:
        assert path.name in str(error)
        str(error).encode("utf-8")
        return []
    assert all(isinstance(row.content, (ChatRow, CompletionRow, TextRow)) for row in rows)
    return rows


def odd_rows(random: Random) -> list[Any]:
    """Return a few rows, one of them with odd values."""
    rows = [json.loads(json.dumps(random.choice(ROWS))) for _ in range(random.randint(1, 3))]
    for _ in range(random.randint(0, 2)):
        if rows:
            odd_edit(random, rows)
    return rows


@lengths(250, 15_000)
def test_any_json_lines_give_rows_or_an_error_with_the_file(n_examples: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def check(random: Random) -> None:
        lines = [json.dumps(row) for row in odd_rows(random)]
        if lines and lines[0][:2] not in ("{}", "[]") and lines[0][0] == "{" and random.random() < 0.2:
            lines[0], _ = odd_text(random, lines[0])
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(edited_bytes(random, text) if random.random() < 0.5 else text)
        # What is skipped changes nothing about the other rows.
        assert len(rows_of(path, FileKind.JSON_LINES, skip=True)) >= len(rows_of(path, FileKind.JSON, skip=False))

    fuzz(n_examples, check, RANDOM)


@lengths(150, 10_000)
def test_any_json_array_gives_rows_or_an_error_with_the_file(n_examples: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"

    def check(random: Random) -> None:
        text = json.dumps(odd_rows(random), indent=random.choice([None, 0, 1])).encode("utf-8", "surrogatepass")
        path.write_bytes(edited_bytes(random, text))
        rows_of(path, FileKind.JSON, skip=random.random() < 0.5)

    fuzz(n_examples, check, RANDOM)


TABLES = [
    {"text": ["a", "b" * 40, None]},
    {"messages": [[{"role": "user", "content": "a"}], None], "tools": [None, "[]"]},
    {"prompt": ["a"], "completion": ["b"], "more": [3]},
]


def parquet_bytes(table: dict[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), buffer, compression="NONE")
    return buffer.getvalue()


def stream_bytes(table: dict[str, list[Any]]) -> bytes:
    buffer, columns = io.BytesIO(), pyarrow.table(table)
    with pyarrow.ipc.new_stream(buffer, columns.schema) as stream:
        stream.write_table(columns)
    return buffer.getvalue()


@lengths(80, 8_000)
def test_any_parquet_file_gives_rows_or_an_error_with_the_file(n_examples: int, tmp_path: Path) -> None:
    path, whole = tmp_path / "rows.parquet", [parquet_bytes(table) for table in TABLES]

    def check(random: Random) -> None:
        path.write_bytes(edited_bytes(random, random.choice(whole)))
        rows_of(path, FileKind.PARQUET, skip=random.random() < 0.5)

    fuzz(n_examples, check, RANDOM)


@lengths(80, 8_000)
def test_any_arrow_stream_gives_rows_or_an_error_with_the_file(n_examples: int, tmp_path: Path) -> None:
    path, whole = tmp_path / "rows.arrow", [stream_bytes(table) for table in TABLES]

    def check(random: Random) -> None:
        path.write_bytes(edited_bytes(random, random.choice(whole)))
        rows_of(path, FileKind.ARROW_STREAM, skip=random.random() < 0.5)

    fuzz(n_examples, check, RANDOM)
