"""Rows in the formats of ShareGPT and Alpaca become the conversations that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qformat.errors import DataError
from qformat.training.data.place import Place
from qformat.training.data.rows import ChatRow, Row, parse_fields
from tests.training.data.chat.stock_templates import CALL


def parse(row: dict[str, Any]) -> Row:
    return parse_fields(row, Place(Path("rows.json"), "entry", 2))


def messages(row: dict[str, Any]) -> list[tuple[object, object]]:
    content = parse(row).content
    assert isinstance(content, ChatRow)
    return [(message["role"], message.get("content")) for message in content.messages]


def turn(name: str, value: str) -> dict[str, str]:
    return {"from": name, "value": value}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [turn("human", "a"), turn("gpt", "b")]}, [("user", "a"), ("assistant", "b")]),
        (
            {"system": "s", "conversations": [turn("user", "a"), turn("model", "b"), turn("observation", "c")]},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c")],
        ),
        (
            {"id": 7, "conversations": [turn("system", "s"), turn("human", "a"), turn("chatgpt", "b")]},
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        ({"conversations": [{"role": "user", "content": "a"}]}, [("user", "a")]),
        ({"instruction": "a", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        (
            {"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["q", "r"]]},
            [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a\n\ni"), ("assistant", "b")],
        ),
        ({"messages": [{"role": "model", "content": "b"}]}, [("assistant", "b")]),
        ({"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
         [("user", "a"), ("assistant", "b")]),
    ],
)  # fmt: skip
def test_a_row_becomes_a_conversation(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert messages(row) == expected


def test_a_function_call_becomes_a_tool_call() -> None:
    call = turn("function_call", '{"name": "weather", "arguments": {"city": "Paris"}}')
    content = parse({"conversations": [turn("human", "a"), call]}).content
    assert isinstance(content, ChatRow)
    (made,) = content.messages[1]["tool_calls"]  # type: ignore[misc]
    assert made["function"] == CALL["function"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": "a"}, "'conversations': expected a list of turns, got a string"),
        ({"conversations": []}, "'conversations' has no messages"),
        ({"conversations": [3]}, r"conversations\[0\]: expected an object with 'from' and 'value', got a number"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: 'content': expected a string, got nothing"),
        ({"instruction": "a", "output": 3}, "'output': expected a string, got a number"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "'history': expected a list of pairs"),
        ({"instruction": "a"}, "has no 'messages'"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"entry 2: {problem}"):
        parse(row)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"conversations": [turn("human", "a")]}, "ShareGPT"),
        ({"instruction": "a", "output": "b"}, "Alpaca"),
        ({"messages": [{"role": "user", "content": "a"}], "instruction": "a", "output": "b"}, None),
        ({"text": "a", "instruction": "a", "output": "b"}, None),
    ],
)
def test_a_converted_row_names_its_format(row: dict[str, Any], format: str | None) -> None:
    assert parse(row).converted_from == format
