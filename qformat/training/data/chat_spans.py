"""Renders a conversation as text and locates the characters that the assistant wrote.

A template with `{% generation %}` markers marks them itself. Without markers, the conversation is rendered up to each
assistant turn and once more with the turn. The turn is the difference between the two texts:

    render(messages[:2], add_generation_prompt)    <user>Hi</s><assistant>
    render(messages[:3])                           <user>Hi</s><assistant>Hello!</s>\\n
    the turn                                                             ^^^^^^^^^^

This is exact only if each text begins with the previous one, which is checked. Some templates render a turn differently
once more turns follow, for example to drop earlier reasoning. Such a conversation is rejected. If a template does not
support the generation prompt, the header of the turn is trained as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from qformat.errors import Option, UsageError
from qformat.training.data.reading.rows import BadRow, ChatRow, Message, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_WHAT_TO_DO = (
    "Use a chat template with {% generation %} markers around the assistant turns, or train on all tokens with ",
    Option("loss_on", "all"),
)

Span = tuple[int, int]
"""Range [start, stop) of characters in a text."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """Renders conversations with the chat template of one tokenizer.

    Attributes:
        tokenizer: Tokenizer that applies the template.
        template: The chat template.
        has_markers: Whether the template has `{% generation %}` markers.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    has_markers: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Conversations:
        """Return an instance for the chat template of a tokenizer.

        Raises:
            UsageError: The tokenizer has no chat template.
        """
        try:
            template = tokenizer.get_chat_template()
        except ValueError as missing:
            raise UsageError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template, which rows with 'messages' need. "
                "Set tokenizer.chat_template, or use rows with 'text' or with 'prompt' and 'completion'"
            ) from missing
        return cls(tokenizer, template, _MARKERS.search(template) is not None)

    def render(self, row: ChatRow, place: Place) -> str:
        """Return the whole conversation as text.

        Args:
            row: Conversation to render.
            place: Origin of the row, for messages.

        Returns:
            The text.

        Raises:
            DataError: The template fails for this conversation.
        """
        try:
            return self._text(row, len(row.messages))
        except _TEMPLATE_FAILURES as problem:
            place.refuse(BadRow.TEMPLATE_REFUSED, f"the chat template fails: {_first_line(problem)}")

    def render_with_spans(self, row: ChatRow, place: Place) -> tuple[str, list[Span]]:
        """Return the whole conversation as text, and the ranges that the assistant wrote.

        Args:
            row: Conversation to render.
            place: Origin of the row, for messages.

        Returns:
            The text, and the assistant turns in ascending order, each with its end-of-turn token.

        Raises:
            DataError: The template fails, or it has no markers and the turns cannot be located.
        """
        if self.has_markers:
            return self._marked(row, place)
        text = self.render(row, place)
        return text, self._added_spans(row, text, place)

    def completion_start(self, row: ChatRow, text: str, place: Place) -> int:
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
        before = self._prefix(row, row.n_prompt, place, ask=True)
        if not text.startswith(before):
            place.refuse(
                BadRow.UNSTABLE_TEMPLATE,
                "the chat template renders the prompt differently when the completion follows",
                next_step=_WHAT_TO_DO,
            )
        return len(before)

    def _marked(self, row: ChatRow, place: Place) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        # apply_chat_template calls this function, but turns the spans into a mask of tokens. The function is annotated
        # to return one string; it returns the texts and the spans that the markers of each text enclose.
        render: Any = chat_template_utils.render_jinja_template
        try:
            texts, spans_by_text = render(
                conversations=[row.messages],
                tools=row.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except _TEMPLATE_FAILURES as problem:
            place.refuse(BadRow.TEMPLATE_REFUSED, f"the chat template fails: {_first_line(problem)}")
        return texts[0], [(start, stop) for start, stop in spans_by_text[0] if start < stop]

    def _added_spans(self, row: ChatRow, text: str, place: Place) -> list[Span]:
        spans: list[Span] = []
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            before = self._prefix(row, index, place, ask=True)
            last = index + 1 == len(row.messages)
            after = text if last else self._prefix(row, index + 1, place, ask=False)
            if not after.startswith(before) or not text.startswith(after):
                place.refuse(
                    BadRow.UNSTABLE_TEMPLATE,
                    f"the chat template renders messages[{index}] differently when more messages follow, "
                    "so the tokens of the assistant cannot be located",
                    next_step=_WHAT_TO_DO,
                )
            spans.append((len(before), self._end_of_turn(after, len(before))))
        return [(start, stop) for start, stop in spans if start < stop]

    def _end_of_turn(self, text: str, start: int) -> int:
        """Return the end of the turn without the whitespace after the end-of-turn token, which is never generated."""
        written = text.rstrip()
        eos = self.tokenizer.eos_token
        return len(written) if isinstance(eos, str) and len(written) > start and written.endswith(eos) else len(text)

    def _prefix(self, row: ChatRow, n_messages: int, place: Place, *, ask: bool) -> str:
        try:
            return self._text(row, n_messages, ask=ask)
        except _TEMPLATE_FAILURES as problem:
            place.refuse(
                BadRow.UNSTABLE_TEMPLATE,
                f"the chat template fails for the first {n_messages} messages, which are needed to locate the tokens "
                f"of the assistant: {_first_line(problem)}",
                next_step=_WHAT_TO_DO,
            )

    def _text(self, row: ChatRow, n_messages: int, *, ask: bool = False) -> str:
        messages: list[Message] = row.messages[:n_messages]
        text = self.tokenizer.apply_chat_template(
            messages,  # type: ignore[arg-type]
            tools=row.tools,  # type: ignore[arg-type]
            chat_template=self.template,
            add_generation_prompt=ask,
            tokenize=False,
        )
        assert isinstance(text, str)
        return text


# Templates are programs: besides raise_exception(), they raise Python's errors for a missing key or a wrong type.
_TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def _first_line(problem: BaseException) -> str:
    return str(problem).partition("\n")[0] or type(problem).__name__
