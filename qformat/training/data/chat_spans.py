"""A conversation as text, and which of its characters the assistant wrote.

A template with `{% generation %}` markers tells that itself. Without them, the conversation is rendered up to each
turn of the assistant and again with it; what the second text has more is the turn:

    render(messages[:2], add_generation_prompt)    <user>Hi</s><assistant>
    render(messages[:3])                           <user>Hi</s><assistant>Hello!</s>\\n
    the turn                                                             ^^^^^^^^^^

This is exact only where each text begins with the one before it, which is checked. A template that shows a turn in
another way once more turns follow it (as those do that drop earlier reasoning) is refused for such a conversation.
A template that knows no generation prompt has the header of the turn trained with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from qformat.errors import UsageError
from qformat.training.data.reading.rows import BadRow, ChatRow, Message, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_WHAT_TO_DO = (
    "Use a chat template with {% generation %} markers around the assistant's turns, or train on all tokens "
    "with loss_on='all'"
)

Span = tuple[int, int]
"""Characters [start, stop) of a text."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """How conversations become text: one tokenizer's chat template."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    has_markers: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Conversations:
        """Take the template of a tokenizer. Raises UsageError if it has none."""
        try:
            template = tokenizer.get_chat_template()
        except ValueError as missing:
            raise UsageError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template, which `messages` need. "
                "Set tokenizer.chat_template, or give rows with 'text' or 'prompt' and 'completion'"
            ) from missing
        return cls(tokenizer, template, _MARKERS.search(template) is not None)

    def render(self, row: ChatRow, place: Place) -> str:
        """Return the whole conversation as text. Raises DataError where the template refuses it."""
        try:
            return self._text(row, len(row.messages))
        except _TEMPLATE_FAILURES as problem:
            place.refuse(BadRow.TEMPLATE_REFUSED, f"the chat template refuses it: {_first_line(problem)}")

    def render_with_spans(self, row: ChatRow, place: Place) -> tuple[str, list[Span]]:
        """Return the whole conversation as text, and what the assistant wrote there: ascending, with the end of turn.

        Raises DataError as `render`, and where the template has no markers and a turn cannot be told from what
        surrounds it.
        """
        if self.has_markers:
            return self._marked(row, place)
        text = self.render(row, place)
        return text, self._added_spans(row, text, place)

    def completion_start(self, row: ChatRow, text: str, place: Place) -> int:
        """Return where the completion of a conversational prompt begins in `text`. Raises DataError as above."""
        assert row.n_prompt is not None
        before = self._prefix(row, row.n_prompt, place, ask=True)
        if not text.startswith(before):
            place.refuse(
                BadRow.UNSTABLE_TEMPLATE,
                "the chat template shows the prompt in another way when the completion follows",
                next_step=_WHAT_TO_DO,
            )
        return len(before)

    def _marked(self, row: ChatRow, place: Place) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        # What apply_chat_template calls; that one keeps only the tokens of the spans. Annotated to return one string,
        # but it returns the texts and, for each, where its markers lay.
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
            place.refuse(BadRow.TEMPLATE_REFUSED, f"the chat template refuses it: {_first_line(problem)}")
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
                    f"the chat template shows messages[{index}] in another way when more messages follow, "
                    "so that the assistant's tokens cannot be told apart",
                    next_step=_WHAT_TO_DO,
                )
            spans.append((len(before), self._end_of_turn(after, len(before))))
        return [(start, stop) for start, stop in spans if start < stop]

    def _end_of_turn(self, text: str, start: int) -> int:
        """Leave out white space behind the end-of-turn token: generation has stopped by then."""
        written = text.rstrip()
        eos = self.tokenizer.eos_token
        return len(written) if isinstance(eos, str) and len(written) > start and written.endswith(eos) else len(text)

    def _prefix(self, row: ChatRow, n_messages: int, place: Place, *, ask: bool) -> str:
        try:
            return self._text(row, n_messages, ask=ask)
        except _TEMPLATE_FAILURES as problem:
            place.refuse(
                BadRow.UNSTABLE_TEMPLATE,
                f"the chat template refuses its first {n_messages} messages, which is how the assistant's tokens are "
                f"found: {_first_line(problem)}",
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


# Templates are programs: besides raise_exception(), they fail as Python does, on a missing key or a wrong type.
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
