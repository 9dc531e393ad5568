"""Proves that what a conversation holds stands in its rendered text.

A template is a program that may leave out anything: a role that it does not know, content in a form that it does not
read, tools, or what comes beside a tool call. A training on such a text would not be the training that the row
describes, and nothing would tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from qformat.strict_json import Json
from qformat.training.data.chat.messages import Message

_SPACES = re.compile(r"\s+")
_THINKING = re.compile(r"</?think(?:ing)?>")
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message's reasoning. transformers gives a template all of them if a message has one."""


def lost_field(messages: list[Message], tools: list[Json] | None, text: str) -> str | None:
    """Return the first field of a conversation that does not stand in its text, or None if everything does.

    Whitespace does not count, because templates trim texts. Messages must stand in their order, except those of the
    system, which some templates move. Arguments may be quoted as in JSON or Python.

    Args:
        messages: Messages of the conversation.
        tools: Tools of the conversation, or None.
        text: The rendered text.

    Returns:
        The field, such as `messages[2].content`.
    """
    if not tools and _stand_in_order(messages, text):
        return None
    for index, tool in enumerate(tools or ()):
        name = _function(tool).get("name")
        if isinstance(name, str) and name not in text:
            return f"tools[{index}].function.name"
    search = _Search(text)
    for index, message in enumerate(messages):
        for field, values, ordered in _texts(message):
            if not all(search.finds(value, ordered=ordered) for value in values):
                return f"messages[{index}].{field}"
    return None


def _stand_in_order(messages: list[Message], text: str) -> bool:
    """Return whether the messages have only content, which stands in the text as it is. This is the usual case."""
    position = 0
    for message in messages:
        content = message.get("content")
        if len(message) != 2 or not isinstance(content, str):
            return False
        found = text.find(content, position)
        if found < 0:
            return False
        position = found + len(content)
    return True


def _texts(message: Message) -> Iterator[tuple[str, list[str], bool]]:
    """Yield each field of a message, the texts that it holds, and whether they must follow what comes before."""
    ordered = message["role"] not in ("system", "developer")
    reasoning = next((message[field] for field in _REASONING if isinstance(message.get(field), str)), None)
    if isinstance(reasoning, str):
        yield next(field for field in _REASONING if field in message), [reasoning], False
    content = message.get("content")
    if isinstance(content, str):
        yield "content", _THINKING.split(content), ordered
    calls = message.get("tool_calls")
    for index, call in enumerate(calls if isinstance(calls, list) else ()):
        function = _function(call)
        name = function.get("name")
        if isinstance(name, str):
            yield f"tool_calls[{index}].function.name", [name], False
        yield f"tool_calls[{index}].function.arguments", list(_leaves(function.get("arguments"))), False


def _function(value: Json) -> Message:
    if not isinstance(value, dict):
        return {}
    function = value.get("function")
    return function if isinstance(function, dict) else value


def _leaves(value: Json) -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from _leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, str):
        yield value


class _Search:
    """Looks for texts in a rendered conversation, each one after the one before.

    Args:
        text: The rendered conversation.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._squeezed: str | None = None
        self._squeezed_position = 0

    def finds(self, value: str, *, ordered: bool) -> bool:
        """Return whether the text has a value, in one of the forms in which templates print it.

        Args:
            value: Text to look for.
            ordered: Whether it must stand behind the last text that was found in order.
        """
        value = value.strip()
        if not value:
            return True
        if self._squeezed is None:
            position = self._text.find(value, self._position if ordered else 0)
            if position >= 0:
                self._position = position + len(value) if ordered else self._position
                return True
            # From here on, compare without whitespace.
            self._squeezed = _without_spaces(self._text)
            self._squeezed_position = len(_without_spaces(self._text[: self._position]))
        return any(self._finds_squeezed(form, ordered=ordered) for form in _forms(value))

    def _finds_squeezed(self, value: str, *, ordered: bool) -> bool:
        assert self._squeezed is not None
        position = self._squeezed.find(value, self._squeezed_position if ordered else 0)
        if position >= 0 and ordered:
            self._squeezed_position = position + len(value)
        return position >= 0


def _forms(value: str) -> Iterator[str]:
    """Yield a text as it is, and as a string of JSON and of Python, without whitespace."""
    yield _without_spaces(value)
    quoted = {json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value)}
    for text in sorted(quoted):
        yield _without_spaces(text[1:-1])


def _without_spaces(text: str) -> str:
    return _SPACES.sub("", text)
