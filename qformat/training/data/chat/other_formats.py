"""Turns rows in the formats of ShareGPT and Alpaca, which many data sets have, into messages.

ShareGPT   {"system": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
Alpaca     {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[..., ...], ...]}
"""

from __future__ import annotations

from dataclasses import dataclass

from qformat.strict_json import Json
from qformat.training.data.place import BadRow, Place, json_in_string, kind_of

OTHER_FIELDS = ("conversations", "instruction", "input", "output", "system", "history")
"""Fields of these formats."""


@dataclass(frozen=True, slots=True)
class OtherFormat:
    """A row that was converted.

    Attributes:
        format: Name of the format.
        field: Name of the field that the messages come from, for messages about errors.
        messages: The messages, which are not checked yet.
    """

    format: str
    field: str
    messages: list[Json]


def as_messages(present: dict[str, Json], place: Place) -> OtherFormat | None:
    """Return the messages of a row in the format of ShareGPT or Alpaca, or None if it has another format.

    Args:
        present: Fields of the row that are not null.
        place: Origin of the row.

    Returns:
        The converted row.

    Raises:
        DataError: A field has the wrong type.
    """
    if "conversations" in present:
        return OtherFormat("ShareGPT", "conversations", [*_system(present, place), *_sharegpt(present, place)])
    if "instruction" in present and "output" in present:
        return OtherFormat("Alpaca", "instruction", [*_system(present, place), *_alpaca(present, place)])
    return None


def _sharegpt(present: dict[str, Json], place: Place) -> list[Json]:
    turns = present["conversations"]
    if not isinstance(turns, list):
        place.refuse(BadRow.WRONG_TYPE, f"'conversations': expected a list of turns, got {kind_of(turns)}")
    return [_turn(turn, f"conversations[{index}]", place) for index, turn in enumerate(turns)]


def _turn(turn: Json, name: str, place: Place) -> Json:
    if not isinstance(turn, dict):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: expected an object with 'from' and 'value', got {kind_of(turn)}")
    if "from" not in turn:
        return turn  # some data sets have messages with role and content under this name
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] == "function_call":
        call = turn.get("value")
        function = json_in_string(call, f"{name}: 'value'", place) if isinstance(call, str) else call
        return {**rest, "role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    return {**rest, "role": turn["from"], "content": turn.get("value")}


def _alpaca(present: dict[str, Json], place: Place) -> list[Json]:
    found: list[Json] = []
    history = present.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        place.refuse(BadRow.WRONG_TYPE, "'history': expected a list of pairs of a question and its answer")
    for pair in history:
        assert isinstance(pair, list)
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question, more = _string(present, "instruction", place), _string(present, "input", place)
    answer = _string(present, "output", place)
    if not answer:
        place.refuse(BadRow.EMPTY, "'output' is empty")
    content = f"{question}\n\n{more}" if question and more else question or more
    return [*found, {"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def _system(present: dict[str, Json], place: Place) -> list[Json]:
    text = _string(present, "system", place)
    return [{"role": "system", "content": text}] if text else []


def _string(present: dict[str, Json], name: str, place: Place) -> str:
    value = present.get(name, "")
    if not isinstance(value, str):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r}: expected a string, got {kind_of(value)}")
    return value
