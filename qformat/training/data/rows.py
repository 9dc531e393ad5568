"""Parses rows of training data and rejects rows that cannot be used.

The format is decided for each row, so one file may mix formats. If a row has the fields of several formats, the first
one in this list applies (UltraChat, for example, has `prompt` beside `messages`):

    messages               a conversation; `tools` lists what the assistant may call, and `chat_template_kwargs` sets
                           variables of the chat template
    prompt, completion     two strings, or two lists of messages (with `tools`)
    text                   one string
    conversations          a conversation in the format of ShareGPT
    instruction, output    a question and its answer in the format of Alpaca

Other fields are ignored. A null field counts as absent, because Parquet fills missing columns of a mixed file with
nulls.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qformat import strict_json
from qformat.errors import InvalidFileError, Reason, SourceError
from qformat.strict_json import Json
from qformat.training.data.chat.messages import Message, parse_messages, parse_template_kwargs, parse_tools
from qformat.training.data.chat.other_formats import OTHER_FIELDS, as_messages
from qformat.training.data.place import CORRECT_IT, BadRow, Place, json_limit, kind_of

FIELDS = ("messages", "prompt", "completion", "text", "tools", "chat_template_kwargs", *OTHER_FIELDS)


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
        template_kwargs: Variables of the chat template by name.
    """

    messages: list[Message]
    tools: list[Json] | None
    n_prompt: int | None
    template_kwargs: dict[str, Json] = field(default_factory=dict)


Content = TextRow | CompletionRow | ChatRow


@dataclass(frozen=True, slots=True)
class Row:
    """Content and origin of a row.

    Attributes:
        place: Origin of the row.
        content: Content of the row.
        converted_from: Name of the format that the row was converted from, or None.
    """

    place: Place
    content: Content
    converted_from: str | None = None


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
        value = strict_json.loads(line, path="", max_nbytes=json_limit(line), error=SourceError)
    except InvalidFileError as refused:
        if refused.reason is Reason.JSON_LIMIT:
            place.refuse(BadRow.TOO_LARGE, refused.problem)
        place.refuse(BadRow.NOT_UTF8 if "not valid UTF-8" in refused.problem else BadRow.NOT_JSON, refused.problem)
    if not isinstance(value, dict):
        place.refuse(
            BadRow.NOT_AN_OBJECT,
            f"expected an object, got {kind_of(value)}",
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
        return Row(place, _with_kwargs(_conversation(present["messages"], "messages", present, place), present, place))
    if "prompt" in present and "completion" in present:
        return Row(place, _with_kwargs(_prompt_and_completion(present, place), present, place))
    if "text" in present:
        return Row(place, TextRow(_text(present["text"], "text", place)))
    other = as_messages(present, place)
    if other is not None:
        conversation = _conversation(other.messages, other.field, present, place)
        return Row(place, _with_kwargs(conversation, present, place), other.format)
    names = ", ".join(f"{name!r} (null)" if value is None else repr(name) for name, value in list(fields.items())[:8])
    problem = f"has no 'messages', 'prompt' and 'completion', or 'text' (found {names or 'no fields'})"
    return place.refuse(BadRow.NO_KNOWN_FIELD, problem)


def _conversation(value: Json, name: str, present: dict[str, Json], place: Place) -> ChatRow:
    return ChatRow(parse_messages(value, name, place), parse_tools(present.get("tools"), place), None)


def _with_kwargs(content: Content, present: dict[str, Json], place: Place) -> Content:
    if "chat_template_kwargs" not in present or not isinstance(content, ChatRow):
        return content
    return replace(content, template_kwargs=parse_template_kwargs(present["chat_template_kwargs"], place))


def _prompt_and_completion(present: dict[str, Json], place: Place) -> Content:
    prompt, completion = present["prompt"], present["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = parse_messages(prompt, "prompt", place)
        after = parse_messages(completion, "completion", place)
        return ChatRow(before + after, parse_tools(present.get("tools"), place), len(before))
    if isinstance(prompt, str) and isinstance(completion, str):
        return CompletionRow(prompt, _text(completion, "completion", place))
    return place.refuse(
        BadRow.WRONG_TYPE,
        "'prompt' and 'completion' must both be strings or both be lists of messages "
        f"(got {kind_of(prompt)} and {kind_of(completion)})",
    )


def _text(value: Json, name: str, place: Place) -> str:
    if not isinstance(value, str):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r}: expected a string, got {kind_of(value)}")
    if not value:
        place.refuse(BadRow.EMPTY, f"{name!r} is empty")
    return value
