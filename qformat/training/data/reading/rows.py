"""One row of training data: which fields it has, and what makes it unusable.

The format of each row is judged by itself, so that a file may mix them. Where a row has the fields of several, the
first of this list is taken (UltraChat, for one, carries `prompt` beside `messages`):

    messages               a conversation; with `tools`, what the assistant may call
    prompt, completion     two strings, or two lists of messages (and `tools`)
    text                   one string

Fields of other names are ignored, and a field that is null counts as absent, as Parquet fills the columns of the
other rows of a mixed file with nulls.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from qformat import strict_json
from qformat.errors import DataError, InvalidFileError, Reason, SourceError
from qformat.strict_json import Json

FIELDS = ("messages", "prompt", "completion", "text", "tools")

Message = dict[str, Json]

CORRECT_OR_SKIP = "Correct it, or skip rows like it with skip_bad_lines"


class BadRow(StrEnum):
    """Why a row cannot be used. The values are stable: statistics count by them."""

    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    NO_KNOWN_FIELD = "no_known_field"
    WRONG_TYPE = "wrong_type"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    TEMPLATE_REFUSED = "template_refused"
    UNSTABLE_TEMPLATE = "unstable_template"
    DAMAGED_FILE = "damaged_file"  # of a whole file: never skipped


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row comes from: `train.jsonl`, `line`, 17. Counted from 1."""

    path: Path
    unit: str
    number: int

    def refuse(self, reason: BadRow, problem: str, *, next_step: str = CORRECT_OR_SKIP) -> NoReturn:
        """Raise the DataError of this row."""
        raise DataError(reason, self.path, problem, place=f"{self.unit} {self.number}", next_step=next_step) from None


@dataclass(frozen=True, slots=True)
class TextRow:
    """A plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A plain prompt and what follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation of one message or more. n_prompt: the messages of the prompt, None where the row has no prompt."""

    messages: list[Message]
    tools: list[Json] | None
    n_prompt: int | None


Content = TextRow | CompletionRow | ChatRow


@dataclass(frozen=True, slots=True)
class Row:
    """A row's content and where it comes from."""

    place: Place
    content: Content


def parse_line(line: bytes, place: Place) -> Row:
    """Parse one line of a JSON lines file; its length was checked. Raises DataError."""
    if not line.strip():
        place.refuse(BadRow.EMPTY, "is an empty line")
    try:
        value = strict_json.loads(line, path="", max_nbytes=_limit(line), error=SourceError)
    except InvalidFileError as refused:
        if refused.reason is Reason.JSON_LIMIT:
            place.refuse(BadRow.TOO_LARGE, refused.problem)
        place.refuse(BadRow.NOT_UTF8 if "not valid UTF-8" in refused.problem else BadRow.NOT_JSON, refused.problem)
    if not isinstance(value, dict):
        place.refuse(
            BadRow.NOT_AN_OBJECT,
            f"is {_kind(value)}, not an object",
            next_step="JSON lines are one object on each line, with no list around them. " + CORRECT_OR_SKIP,
        )
    return parse_fields(value, place)


def parse_fields(fields: dict[str, Json], place: Place) -> Row:
    """Judge the fields of one row. Raises DataError."""
    present = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
    if "messages" in present:
        messages = _messages(present["messages"], "messages", place)
        return Row(place, ChatRow(messages, _tools(present.get("tools"), place), None))
    if "prompt" in present and "completion" in present:
        return Row(place, _prompt_and_completion(present, place))
    if "text" in present:
        return Row(place, TextRow(_text(present["text"], "text", place)))
    names = ", ".join(f"{name!r} (null)" if value is None else repr(name) for name, value in list(fields.items())[:8])
    problem = f"has {names or 'no field at all'}, but neither 'messages' nor 'prompt' and 'completion' nor 'text'"
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
        f"'prompt' is {_kind(prompt)} and 'completion' is {_kind(completion)}: "
        "both must be strings, or both lists of messages",
    )


def _text(value: Json, name: str, place: Place) -> str:
    if not isinstance(value, str):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r} is {_kind(value)}, not a string")
    if not value:
        place.refuse(BadRow.EMPTY, f"{name!r} is empty")
    return value


def _messages(value: Json, name: str, place: Place) -> list[Message]:
    if not isinstance(value, list):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r} is {_kind(value)}, not a list of messages")
    if not value:
        place.refuse(BadRow.EMPTY, f"{name!r} has no message")
    return [_message(entry, f"{name}[{index}]", place) for index, entry in enumerate(value)]


def _message(value: Json, name: str, place: Place) -> Message:
    if not isinstance(value, dict):
        place.refuse(BadRow.WRONG_TYPE, f"{name} is {_kind(value)}, not an object with 'role' and 'content'")
    # As transformers does: templates print a null as "None", but know what to do with an absent key.
    message: Message = {key: entry for key, entry in value.items() if entry is not None}
    if not isinstance(message.get("role"), str):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: 'role' is {_kind(value.get('role'))}, not a string")
    if not isinstance(message.get("content"), str) and not (
        "content" not in message and isinstance(message.get("tool_calls"), list)
    ):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: 'content' is {_kind(value.get('content'))}, not a string")
    return message


def _tools(value: Json, place: Place) -> list[Json] | None:
    """Return the tools of a row. Hub datasets often keep them as JSON inside of a string, whose types vary by row."""
    if isinstance(value, str):
        data = value.encode("utf-8")
        try:
            value = strict_json.loads(data, path="", max_nbytes=_limit(data), error=SourceError)
        except InvalidFileError as refused:
            place.refuse(BadRow.WRONG_TYPE, f"'tools': {refused.problem}")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        place.refuse(BadRow.WRONG_TYPE, f"'tools' is {_kind(value)}, not a list of objects")
    return value


def _limit(data: bytes) -> int:
    """The size of what is parsed, as the loader also bounds the number of values by it: a short line may be dense."""
    return max(len(data), 2**16)


def _kind(value: Json) -> str:
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    # Parquet has more types than JSON: dates, bytes.
    return {str: "a string", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
