"""Renders conversations with a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from qformat.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Templates are programs: besides raise_exception(), they raise Python's errors for a missing key or a wrong type."""

_PROBE = "qformatprobe"

Messages = Sequence[Mapping[str, Any]]
"""Messages with `role` and, if they have content, a string as `content`."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template and the form in which it reads messages.

    Attributes:
        tokenizer: Tokenizer that applies the template.
        source: The template.
        reads_parts: Whether it reads content as a list of parts, as templates of multimodal models do, and not as a
            string.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    reads_parts: bool = field(default=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, source: str) -> ChatTemplate:
        """Return an instance after a test of the form that the template reads.

        Args:
            tokenizer: Tokenizer that applies the template.
            source: The template.
        """
        plain, parts = cls(tokenizer, source), cls(tokenizer, source, reads_parts=True)
        return parts if not plain._shows_the_probe() and parts._shows_the_probe() else plain

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        ask: bool = False,
    ) -> str:
        """Return a conversation as text.

        Args:
            messages: Messages of the conversation.
            tools: Tools that the assistant may call, or None.
            variables: Variables of the template by name.
            ask: Whether to end with the header of an answer.

        Raises:
            UsageError: The template fails for this conversation.
        """
        return self._rendered(messages, tools, variables, ask=ask, spans=False)[0]

    def render_with_spans(
        self, messages: Messages, *, tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and the ranges of characters between `{% generation %}` markers.

        Args:
            messages: Messages of the conversation.
            tools: Tools that the assistant may call, or None.
            variables: Variables of the template by name.

        Raises:
            UsageError: The template fails for this conversation.
        """
        return self._rendered(messages, tools, variables, ask=False, spans=True)

    def _rendered(
        self,
        messages: Messages,
        tools: Sequence[Any] | None,
        variables: Mapping[str, Any] | None,
        *,
        ask: bool,
        spans: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils import chat_template_utils

        # apply_chat_template calls this function, but turns the spans into a mask of tokens. The function is annotated
        # to return one string; it returns the texts and the spans that the markers of each text enclose.
        render: Any = chat_template_utils.render_jinja_template
        given = [self._message(message) for message in messages]
        problem: Exception | None = None
        # Some templates take the arguments of a tool call as JSON text and fail for an object.
        for form in (given, *_with_arguments_as_text(given)):
            try:
                texts, spans_by_text = render(
                    conversations=[form],
                    tools=tools,
                    chat_template=self.source,
                    add_generation_prompt=ask,
                    return_assistant_tokens_mask=spans,
                    **{**self.tokenizer.special_tokens_map, **(variables or {})},
                )
            except TEMPLATE_FAILURES as failure:
                problem = problem or failure
            else:
                return texts[0], [tuple(span) for span in spans_by_text[0]] if spans else []
        first = str(problem).partition("\n")[0] or type(problem).__name__
        raise UsageError(f"the chat template fails: {first}") from problem

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.reads_parts or not isinstance(message.get("content"), str):
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def _shows_the_probe(self) -> bool:
        try:
            text = self.render([{"role": "user", "content": _PROBE}], ask=True)
        except UsageError:
            return False
        return _PROBE in text and repr(_PROBE) not in text  # a template for strings prints Python's form of a list


def _with_arguments_as_text(messages: Messages) -> Iterator[Messages]:
    """Yield the messages with the arguments of tool calls as JSON text, unless no message has any."""

    def as_text(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": as_text(call["function"])}
        arguments = call.get("arguments")
        return (
            {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, Mapping) else call
        )

    if any(message.get("tool_calls") for message in messages):
        yield [
            {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]
