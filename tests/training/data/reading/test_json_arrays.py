"""JSON arrays as data files, compared with the same rows as JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qformat.errors import DataError
from qformat.training.data.reading import json_arrays
from qformat.training.data.reading.read_rows import BadRows, read_rows
from qformat.training.data.reading.sources import find_files
from qformat.training.data.rows import Content, TextRow

ROWS: list[dict[str, Any]] = [
    {"text": "plain"},
    {"text": 'quotes " and \\ and [brackets]}, and ünïcödé 🙂'},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 500}]},
]


def read(path: Path, *, skip: bool = False, limit: int = 2**20) -> tuple[list[Content], BadRows]:
    bad = BadRows(skip=skip)
    return [row.content for row in read_rows(find_files(path), bad, max_row_nbytes=limit)], bad


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("n_characters", [1, 7, 2**20])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b" \n\t"])
def test_an_array_gives_the_rows_of_json_lines(
    indent: int | None, n_characters: int, start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_arrays, "_READ_CHARACTERS", n_characters)
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    array.write_bytes(start + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode())
    assert read(array)[0] == read(lines)[0]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(read(tmp_path / "rows.json")[0]) == 3


def test_each_row_tells_the_format_that_it_was_converted_from(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"conversations": [{"from": "human", "value": "b"}]}]))
    found = [row.converted_from for row in read_rows(find_files(path), BadRows(skip=False))]
    assert found == ["JSON arrays", "ShareGPT in JSON arrays"]


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(" [ ] \n")
    assert read(tmp_path / "rows.json")[0] == []


@pytest.mark.parametrize(
    ("entry", "reason"),
    [("3", "not_an_object"), ('{"text": NaN}', "not_json"), ('{"body": 1}', "no_known_field"), ("[]", "not_an_object")],
)
def test_a_bad_entry_is_refused_with_its_number_or_skipped(entry: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f'[{{"text": "a"}},\n{entry},\n{{"text": "b"}}]')
    with pytest.raises(DataError, match="entry 2: ") as caught:
        read(path)
    assert caught.value.reason == reason
    found, bad = read(path, skip=True)
    assert found == [TextRow("a"), TextRow("b")]
    assert dict(bad.counts) == {reason: 1}


def test_bytes_that_are_not_utf_8_are_refused_with_their_entry(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b'[{"text": "a"}, {"text": "\xff"}]')
    with pytest.raises(DataError, match="entry 2: ") as caught:
        read(tmp_path / "rows.json")
    assert caught.value.reason == "not_utf8"


@pytest.mark.parametrize("cut", range(1, 36))
def test_a_cut_array_is_refused(cut: int, tmp_path: Path) -> None:
    text = '[{"text": "a"}, {"text": "b"}, {"t": 1}]'
    (tmp_path / "rows.json").write_text(text[:cut])
    with pytest.raises(DataError, match=r"entry \d: "):
        read(tmp_path / "rows.json")


@pytest.mark.parametrize(
    "text", ['[{"text": "a"}] {', '[{"text": "a"} {"text": "b"}]', '[{"text": "a"},]', "[" * 99999]
)
def test_a_damaged_array_is_refused_even_if_bad_rows_are_skipped(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match="the JSON list cannot be read"):
        read(tmp_path / "rows.json", skip=True)


def test_an_entry_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_arrays, "_READ_CHARACTERS", 16)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    with pytest.raises(DataError, match="entry 3: is longer than 100 bytes"):
        read(tmp_path / "rows.json", limit=100)
