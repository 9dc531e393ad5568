"""Renders a conversation as text and locates the characters that the assistant wrote.

A template with `{% generation %}` markers marks them itself. trl has such a version of the templates of many models and
trains on it; so does qformat. Without markers, the conversation is rendered up to each assistant turn and once more
with the turn. The turn is the difference between the two texts:

    render(messages[:2], add_generation_prompt)    <user>Hi</s><assistant>
    render(messages[:3])                           <user>Hi</s><assistant>Hello!</s>\\n
    the turn                                                             ^^^^^^^^^^

This is exact only if each text begins with the previous one, which is checked. Some templates render a turn differently
once more turns follow, for example to drop earlier reasoning. Then the content of the turn is located by a mark in it,
and the turn extends over what surrounds the content, from the end of the header to the end-of-turn token. It is
rejected if its text with the mark differs in anything but the mark. If a template does not support the generation
prompt, the header of the turn is trained as well.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from qformat.errors import Option, UsageError
from qformat.model.text.chat_template import ChatTemplate
from qformat.model.text.render_client import Rendering, Span
from qformat.model.text.rendering import Steps
from qformat.training.data.chat.arrival import lost_field
from qformat.training.data.chat.messages import Message
from qformat.training.data.place import BadRow, Place
from qformat.training.data.rows import ChatRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_WHAT_TO_DO = (
    "Use a chat template with {% generation %} markers around the assistant turns, or train on all tokens with ",
    Option("loss_on", "all"),
)

_MARK = "qformatmark"


class Conversations:
    """Renders conversations with the chat templates of one tokenizer.

    The methods are computations that yield what they need rendered (`qformat.model.text.rendering.run_together`).

    Args:
        tokenizer: Tokenizer with at least one template.

    Raises:
        UsageError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, ChatTemplate] = {}
        self._marked: dict[str, ChatTemplate | None] = {}
        try:
            tokenizer.get_chat_template()
        except ValueError as missing:
            raise UsageError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template, which rows with messages need. "
                "Set tokenizer.chat_template, or use rows with 'text' or with 'prompt' and 'completion'"
            ) from missing

    def render(self, row: ChatRow, place: Place) -> Steps[str]:
        """Return the whole conversation as text.

        Args:
            row: Conversation to render.
            place: Origin of the row, for messages.

        Returns:
            The text.

        Raises:
            DataError: The template fails for this conversation, or leaves out a part of it.
        """
        return (yield from self._whole(self._template_for(row), row, place))

    def render_with_spans(self, row: ChatRow, place: Place) -> Steps[tuple[str, list[Span]]]:
        """Return the whole conversation as text, and the ranges that the assistant wrote.

        Args:
            row: Conversation to render.
            place: Origin of the row, for messages.

        Returns:
            The text, and the assistant turns in ascending order, each with its end-of-turn token.

        Raises:
            DataError: The template fails or leaves out a part, or it has no markers and the turns cannot be located.
        """
        template = self._template_for(row)
        marked = self._marked_version(template)
        if marked is not None:
            return (yield from _marked(marked, row, place))
        text = yield from self._whole(template, row, place)
        return text, (yield from self._turns(template, row, text, place))

    def completion_start(self, row: ChatRow, text: str, place: Place) -> Steps[int]:
        """Return the index in `text` at which the completion of a conversational prompt begins.

        Args:
            row: Conversation with a prompt.
            text: The whole conversation as text.
            place: Origin of the row, for messages.

        Returns:
            The number of characters in the prompt.

        Raises:
            DataError: The template fails for the prompt, or renders it differently when the completion follows.
        """
        assert row.n_prompt is not None
        before = yield from _prefix(self._template_for(row), row, row.n_prompt, place, ask=True)
        if not text.startswith(before):
            place.refuse(
                BadRow.UNSTABLE_TEMPLATE,
                "the chat template renders the prompt differently when the completion follows",
                next_step=_WHAT_TO_DO,
            )
        return len(before)

    def _template_for(self, row: ChatRow) -> ChatTemplate:
        """Return the template for a row: a tokenizer may have one of its own for conversations with tools."""
        source = self._tokenizer.get_chat_template(tools=row.tools)  # type: ignore[arg-type]
        if source not in self._templates:
            self._templates[source] = ChatTemplate.of(self._tokenizer, source)
        return self._templates[source]

    def _marked_version(self, template: ChatTemplate) -> ChatTemplate | None:
        """Return the version of a template with `{% generation %}` markers, or None if there is none."""
        source = template.template.source
        if source not in self._marked:
            marked = source if _MARKERS.search(source) else _training_template(self._tokenizer, source)
            self._marked[source] = None if marked is None else ChatTemplate.of(self._tokenizer, marked)
        return self._marked[source]

    def _whole(self, template: ChatTemplate, row: ChatRow, place: Place) -> Steps[str]:
        try:
            text = yield from _text(template, row, len(row.messages))
        except UsageError as problem:
            place.refuse(BadRow.TEMPLATE_REFUSED, str(problem))
        _check_arrival(row, text, place)
        return text

    def _turns(self, template: ChatTemplate, row: ChatRow, text: str, place: Place) -> Steps[list[Span]]:
        spans: list[Span] = []
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            span = yield from self._added(template, row, index, text, place)
            if span is None:
                span = yield from self._around_content(template, row, index, text, spans[-1][1] if spans else 0)
            if span is None:
                place.refuse(
                    BadRow.UNSTABLE_TEMPLATE,
                    f"the chat template renders messages[{index}] differently when more messages follow, "
                    "so the tokens of the assistant cannot be located",
                    next_step=_WHAT_TO_DO,
                )
            spans.append(span)
        return [(start, stop) for start, stop in spans if start < stop]

    def _added(self, template: ChatTemplate, row: ChatRow, index: int, text: str, place: Place) -> Steps[Span | None]:
        """Return what a turn adds to the text before it, or None if the text before it changes."""
        before = yield from _prefix(template, row, index, place, ask=True)
        after = text
        if index + 1 < len(row.messages):
            after = yield from _prefix(template, row, index + 1, place, ask=False)
        if not after.startswith(before) or not text.startswith(after):
            return None
        return len(before), self._end_of_turn(after, len(before))

    def _around_content(
        self, template: ChatTemplate, row: ChatRow, index: int, text: str, previous_stop: int
    ) -> Steps[Span | None]:
        """Return the turn around the content of a message, or None if the content cannot be located.

        The turn begins behind the header that asks for an answer, or with the content if the header is another one. It
        ends where the texts with and without the later messages begin to differ.
        """
        try:
            start = yield from _content_edge(template, row, index, text, at_end=False)
            stop = yield from _content_edge(template, row, index, text, at_end=True)
            unasked = yield from _text(template, row, index, ask=False)
            asked = yield from _text(template, row, index, ask=True)
            last = (yield _rendering(template, row, _marked_at(row.messages[: index + 1], index, at_end=True))).text
        except UsageError:
            return None
        if start is None or stop is None or _MARK not in last:
            return None
        header = asked.removeprefix(unasked)
        found = text.rfind(header, previous_stop, start) if header and asked.startswith(unasked) else -1
        end = self._outside_of_tokens(text, stop + _n_common(text[stop:], last[last.index(_MARK) + len(_MARK) :]))
        return (start if found < 0 else found + len(header)), self._end_of_turn(text[:end], stop)

    def _outside_of_tokens(self, text: str, index: int) -> int:
        """Return the index, or the start of the special token that it would cut."""
        for token in self._tokenizer.get_added_vocab():
            start = text.find(token, max(0, index - len(token) + 1), index + len(token) - 1)
            if 0 <= start < index < start + len(token):
                return start
        return index

    def _end_of_turn(self, text: str, start: int) -> int:
        """Return the end of the turn without the whitespace after the end-of-turn token, which is never generated."""
        written = text.rstrip()
        eos = self._tokenizer.eos_token
        return len(written) if isinstance(eos, str) and len(written) > start and written.endswith(eos) else len(text)


def _training_template(tokenizer: PreTrainedTokenizerBase, source: str) -> str | None:
    """Return trl's version of a template with markers, or None if trl has none."""
    from trl import chat_template_utils

    # trl renders the template that it is asked about, without limits. So it is asked only about those that it ships.
    shipped = {text for name, text in vars(chat_template_utils).items() if name.endswith("_chat_template")}
    if source not in shipped:
        return None
    with_one_template = copy.copy(tokenizer)
    with_one_template.chat_template = source
    try:
        return chat_template_utils.get_training_chat_template(with_one_template)
    except (TemplateError, TypeError, ValueError):  # no such version, or not for the conversations that trl tries
        return None


def _marked(template: ChatTemplate, row: ChatRow, place: Place) -> Steps[tuple[str, list[Span]]]:
    try:
        rendered = yield _rendering(template, row, row.messages)
    except UsageError as problem:
        place.refuse(BadRow.TEMPLATE_REFUSED, str(problem))
    _check_arrival(row, rendered.text, place)
    return rendered.text, [(start, stop) for start, stop in rendered.spans if start < stop]


def _check_arrival(row: ChatRow, text: str, place: Place) -> None:
    lost = lost_field(row.messages, row.tools, text)
    if lost is not None:
        place.refuse(
            BadRow.LOST_CONTENT,
            f"the chat template leaves out {lost}",
            next_step="Use a template that shows it, set its variables in chat_template_kwargs, or remove the field",
        )


def _prefix(template: ChatTemplate, row: ChatRow, n_messages: int, place: Place, *, ask: bool) -> Steps[str]:
    try:
        return (yield from _text(template, row, n_messages, ask=ask))
    except UsageError as problem:
        place.refuse(
            BadRow.UNSTABLE_TEMPLATE,
            f"for the first {n_messages} messages, which are needed to locate the tokens of the assistant, {problem}",
            next_step=_WHAT_TO_DO,
        )


def _n_common(text: str, other: str) -> int:
    """Return the number of characters that two texts begin with in common."""
    return next(
        (n for n, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), min(len(text), len(other))
    )


def _content_edge(template: ChatTemplate, row: ChatRow, index: int, text: str, *, at_end: bool) -> Steps[int | None]:
    """Return where the content of a message begins or ends in the text, found by a mark that changes nothing else."""
    marked = (yield _rendering(template, row, _marked_at(row.messages, index, at_end=at_end))).text
    return marked.index(_MARK) if _MARK in marked and marked.replace(_MARK, "", 1) == text else None


def _marked_at(messages: list[Message], index: int, *, at_end: bool) -> list[Message]:
    content = str(messages[index].get("content", ""))
    stripped = content.strip()
    marked = {**messages[index], "content": content.replace(stripped, stripped + _MARK if at_end else _MARK + stripped)}
    return [*messages[:index], marked, *messages[index + 1 :]]


def _text(template: ChatTemplate, row: ChatRow, n_messages: int, *, ask: bool = False) -> Steps[str]:
    return (yield _rendering(template, row, row.messages[:n_messages], ask=ask)).text


def _rendering(template: ChatTemplate, row: ChatRow, messages: list[Message], *, ask: bool = False) -> Rendering:
    return template.rendering(messages, tools=row.tools, variables=row.template_kwargs, ask=ask)
