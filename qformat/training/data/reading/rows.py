"""Parses rows of training data and rejects rows that cannot be used.

The format is decided for each row, so one file may mix formats. If a row has the fields of several formats, the first
one in this list applies (UltraChat, for example, has `prompt` beside `messages`):

    messages               a conversation; `tools` lists what the assistant may call
    prompt, completion     two strings, or two lists of messages (with `tools`)
    text                   one string

Other fields are ignored. A null field counts as absent, because Parquet fills missing columns of a mixed file with
nulls.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from qformat import strict_json
from qformat.errors import DataError, InvalidFileError, Reason, SourceError, Words
from qformat.strict_json import Json

FIELDS = ("messages", "prompt", "completion", "text", "tools")

Message = dict[str, Json]

CORRECT_IT = "Correct it"


class BadRow(StrEnum):
    """Reason why a row cannot be used. The values are stable, because statistics count by them."""

    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    NO_KNOWN_FIELD = "no_known_field"
    WRONG_TYPE = "wrong_type"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    TEMPLATE_REFUSED = "template_refused"
    UNSTABLE_TEMPLATE = "unstable_template"
    DAMAGED_FILE = "damaged_file"  # concerns the whole file and is never skipped


@dataclass(frozen=True, slots=True)
class Place:
    """Origin of a row, such as line 17 of train.jsonl.

    Attributes:
        path: File that holds the row.
        unit: "line" or "row".
        number: Number of the line or row, counted from 1.
    """

    path: Path
    unit: str
    number: int

    def refuse(self, reason: BadRow, problem: str, *, next_step: str | Words = CORRECT_IT) -> NoReturn:
        """Raise a DataError for this row.

        Args:
            reason: Why the row cannot be used.
            problem: What is wrong, in words.
            next_step: What the user can do about it.

        Raises:
            DataError: Always.
        """
        raise DataError(reason, self.path, problem, place=f"{self.unit} {self.number}", next_step=next_step) from None


@dataclass(frozen=True, slots=True)
class TextRow:
    """A plain text without a prompt."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A plain prompt and its completion."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation of at least one message.

    Attributes:
        messages: Messages in order, those of the prompt included.
        tools: Tools that the assistant may call, or None.
        n_prompt: Number of messages that form the prompt, or None if the row has no prompt.
    """

    messages: list[Message]
    tools: list[Json] | None
    n_prompt: int | None


Content = TextRow | CompletionRow | ChatRow


@dataclass(frozen=True, slots=True)
class Row:
    """Content and origin of a row."""

    place: Place
    content: Content


def parse_line(line: bytes, place: Place) -> Row:
    """Parse one line of a JSON Lines file.

    Args:
        line: The line, of checked length.
        place: Origin of the line.

    Returns:
        The parsed row.

    Raises:
        DataError: The line cannot be used.
    """
    if not line.strip():
        place.refuse(BadRow.EMPTY, "is empty")
    try:
        value = strict_json.loads(line, path="", max_nbytes=_limit(line), error=SourceError)
    except InvalidFileError as refused:
        if refused.reason is Reason.JSON_LIMIT:
            place.refuse(BadRow.TOO_LARGE, refused.problem)
        place.refuse(BadRow.NOT_UTF8 if "not valid UTF-8" in refused.problem else BadRow.NOT_JSON, refused.problem)
    if not isinstance(value, dict):
        place.refuse(
            BadRow.NOT_AN_OBJECT,
            f"expected an object, got {_kind(value)}",
            next_step="A JSON Lines file has one object per line, without a list around them. " + CORRECT_IT,
        )
    return parse_fields(value, place)


def parse_fields(fields: dict[str, Json], place: Place) -> Row:
    """Parse the fields of one row.

    Args:
        fields: Fields of the row by name.
        place: Origin of the row.

    Returns:
        The parsed row.

    Raises:
        DataError: The row cannot be used.
    """
    present = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
    if "messages" in present:
        messages = _messages(present["messages"], "messages", place)
        return Row(place, ChatRow(messages, _tools(present.get("tools"), place), None))
    if "prompt" in present and "completion" in present:
        return Row(place, _prompt_and_completion(present, place))
    if "text" in present:
        return Row(place, TextRow(_text(present["text"], "text", place)))
    names = ", ".join(f"{name!r} (null)" if value is None else repr(name) for name, value in list(fields.items())[:8])
    problem = f"has no 'messages', 'prompt' and 'completion', or 'text' (found {names or 'no fields'})"
    return place.refuse(BadRow.NO_KNOWN_FIELD, problem)


def _prompt_and_completion(present: dict[str, Json], place: Place) -> Content:
    prompt, completion = present["prompt"], present["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt", place)
        after = _messages(completion, "completion", place)
        return ChatRow(before + after, _tools(present.get("tools"), place), len(before))
    if isinstance(prompt, str) and isinstance(completion, str):
        return CompletionRow(prompt, _text(completion, "completion", place))
    return place.refuse(
        BadRow.WRONG_TYPE,
        "'prompt' and 'completion' must both be strings or both be lists of messages "
        f"(got {_kind(prompt)} and {_kind(completion)})",
    )


def _text(value: Json, name: str, place: Place) -> str:
    if not isinstance(value, str):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r}: expected a string, got {_kind(value)}")
    if not value:
        place.refuse(BadRow.EMPTY, f"{name!r} is empty")
    return value


def _messages(value: Json, name: str, place: Place) -> list[Message]:
    if not isinstance(value, list):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r}: expected a list of messages, got {_kind(value)}")
    if not value:
        place.refuse(BadRow.EMPTY, f"{name!r} has no messages")
    return [_message(entry, f"{name}[{index}]", place) for index, entry in enumerate(value)]


def _message(value: Json, name: str, place: Place) -> Message:
    if not isinstance(value, dict):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: expected an object with 'role' and 'content', got {_kind(value)}")
    # Drop nulls as transformers does: templates print a null as "None" but handle an absent key.
    message: Message = {key: entry for key, entry in value.items() if entry is not None}
    if not isinstance(message.get("role"), str):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: 'role': expected a string, got {_kind(value.get('role'))}")
    if not isinstance(message.get("content"), str) and not (
        "content" not in message and isinstance(message.get("tool_calls"), list)
    ):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: 'content': expected a string, got {_kind(value.get('content'))}")
    return message


def _tools(value: Json, place: Place) -> list[Json] | None:
    """Return the tools of a row. Hub datasets often store them as a JSON string, because their types vary by row."""
    if isinstance(value, str):
        data = value.encode("utf-8")
        try:
            value = strict_json.loads(data, path="", max_nbytes=_limit(data), error=SourceError)
        except InvalidFileError as refused:
            place.refuse(BadRow.WRONG_TYPE, f"'tools': {refused.problem}")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        place.refuse(BadRow.WRONG_TYPE, f"'tools': expected a list of objects, got {_kind(value)}")
    return value


def _limit(data: bytes) -> int:
    """Return the size limit for the JSON loader, which also limits the number of values by it. A short line may have
    many values for its size, so the limit has a lower bound.
    """
    return max(len(data), 2**16)


def _kind(value: Json) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    # Parquet has more types than JSON, such as dates and bytes.
    return {str: "a string", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
