"""The language of chat templates as transformers defines it: Jinja in a sandbox, with a few functions and one tag.

transformers defines it inside a function of its own. This module repeats that definition, because importing
transformers takes ten times as long as the rest of the process that renders (`qformat.model.text.render_process`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning. The first one is the name that most templates read."""


class _GenerationTag(Extension):
    """The tag `{% generation %}`, whose ranges of characters are recorded."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def __init__(self, environment: ImmutableSandboxedEnvironment) -> None:
        super().__init__(environment)
        self.spans: list[tuple[int, int]] = []
        self._pieces: list[str] = []
        self._counted, self._n_characters = 0, 0

    def start(self, pieces: list[str]) -> None:
        """Begin a text, of which the list holds the pieces that are complete."""
        self.spans = []
        self._pieces, self._counted, self._n_characters = pieces, 0, 0

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _enclose(self, context: EvalContext, caller: Callable[[], str]) -> str:
        text = caller()
        self._n_characters += sum(map(len, self._pieces[self._counted :]))
        self._counted = len(self._pieces)
        self.spans.append((self._n_characters, self._n_characters + len(text)))
        return text


class _Dictionaries:
    """The function `dict` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """The function `namespace`, which rejects names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named parameter, so that `namespace(self=...)` works
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
            "Please rename the attribute."
        )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = _Dictionaries()
    made.globals["namespace"] = _Namespace
    return made


class CompiledTemplate:
    """A compiled chat template.

    Args:
        source: The template.
    """

    def __init__(self, source: str) -> None:
        environment = _environment()
        self._tag = next(tag for tag in environment.extensions.values() if isinstance(tag, _GenerationTag))
        self._template = environment.from_string(source)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        variables: Mapping[str, Any],
        *,
        ask: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and the ranges of characters between `{% generation %}` markers.

        Args:
            messages: Messages of plain values (`plain`).
            tools: Tools that the assistant may call, or None.
            variables: Further variables by name.
            ask: Whether to end with the header of an answer.
        """
        pieces: list[str] = []
        self._tag.start(pieces)
        given = {"documents": None, **variables}
        chat = [_with_reasoning(message) for message in messages]
        for piece in self._template.generate(messages=chat, tools=tools, add_generation_prompt=ask, **given):
            pieces.append(piece)
        return "".join(pieces), self._tag.spans


def plain(value: Any) -> Any:
    """Return a value rebuilt from the types of JSON, with the name of its type in the place of any other object.

    Other objects, which Parquet files may hold, have methods that the sandbox does not know to be dangerous.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {plain(key): entry if type(entry) is str else plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, tuple):
        return tuple(plain(entry) for entry in value)
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under the name that most templates read, and that of gpt-oss."""
    for name in _REASONING_FIELDS:
        if message.get(name) is not None:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def with_arguments_as_text(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages with the arguments of tool calls as JSON text, unless no message has any.

    Args:
        messages: Messages of plain values.
    """

    def as_text(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": as_text(call["function"])}
        arguments = call.get("arguments")
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else call

    if any(message.get("tool_calls") for message in messages):
        yield [
            {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]
