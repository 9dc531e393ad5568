"""Damage to training data and texts: JSON Lines, an array, chats, Parquet and plain text."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tests.corpus.damage.edits import Damage, any_edit
from tests.corpus.damage.odd_json import odd_edit, odd_text

TEMPLATE = "chat_template.jinja"


def _lines(random: Random, path: Path) -> str:
    """Damage one line of JSON Lines: its text or its object."""
    lines = path.read_text("utf-8").splitlines()
    number = random.randrange(len(lines))
    match random.randrange(4):
        case 0:
            lines[number], what = odd_text(random, lines[number])
        case 1:
            lines[number] = random.choice(
                ["[]", "3", "null", '"x"', "", " ", "{}", "[[", "\x00", "\u2028", "x" * 70_000]
            )
            what = repr(lines[number][:20])
        case _:
            record = json.loads(lines[number])
            what = odd_edit(random, record)
            lines[number] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return f"line {number + 1}: {what}"


def rows(random: Random, folder: Path) -> Damage:
    path = folder / "rows.jsonl"
    what = _lines(random, path) if random.random() < 0.6 else any_edit(random, path)
    return Damage((path.name,), what)


def chats(random: Random, folder: Path) -> Damage:
    path = folder / "chats.jsonl"
    what = _lines(random, path) if random.random() < 0.6 else any_edit(random, path)
    return Damage((path.name,), what)


def array(random: Random, folder: Path) -> Damage:
    """Damage a JSON array of rows."""
    path = folder / "array.json"
    if random.random() < 0.5:
        return Damage((path.name,), any_edit(random, path))
    entries = json.loads(path.read_bytes())
    what = odd_edit(random, entries)
    path.write_text(json.dumps(entries), "utf-8")
    return Damage((path.name,), what)


def parquet_bytes(random: Random, folder: Path) -> Damage:
    path = folder / "table.parquet"
    return Damage((path.name,), any_edit(random, path))


def parquet_columns(random: Random, folder: Path) -> Damage:
    """Write a valid Parquet file whose columns have other names or types."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "table.parquet"
    columns: dict[str, list[Any]] = random.choice([
        {"text": [1, 2]}, {"text": [None, "x"]}, {"text": [b"\xff", b"a"]}, {"x": ["a"]}, {}, {"text": []},
        {"prompt": ["a"], "completion": [["b"]]}, {"messages": ["x"]}, {"messages": [[{"role": 3, "content": None}]]},
        {"messages": [[]]}, {"prompt": ["a"]}, {"conversations": [[{"from": "x"}]]}, {"text": [{"a": {"b": "c"}}]},
        {"text": ["\x1b[2J" * 10]}, {"\x1b[2J": ["x"]}, {"instruction": ["a"], "output": [None]}, {"text": [[["x"]]]},
    ])  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return Damage((path.name,), str(columns)[:60])


def text(random: Random, folder: Path) -> Damage:
    path = folder / "text.txt"
    return Damage((path.name,), any_edit(random, path))
