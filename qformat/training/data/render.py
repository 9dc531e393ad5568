"""A row as the text that is tokenised, and which of its characters are trained on.

What trl's SFTTrainer does, in its words: `text` and a plain `completion` get the EOS token unless they end with it,
and the tokenizer adds its special tokens (BOS); a conversation is what the chat template makes of it, with nothing
added. One thing differs: a text that brings its own BOS does not get a second one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from qformat.errors import UsageError
from qformat.training.data.chat_spans import Conversations, Span
from qformat.training.data.reading.rows import ChatRow, CompletionRow, Row, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LossOn(StrEnum):
    """Which tokens are trained on. A plain `text` is trained on as a whole either way."""

    COMPLETIONS = "completions"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to tokenise.

    spans: the characters that are trained on, ascending; None for all tokens.
    adds_special_tokens: whether the tokenizer adds its BOS, as it does to plain text.
    """

    text: str
    spans: list[Span] | None
    adds_special_tokens: bool


class Renderer:
    """Renders rows for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._conversations: Conversations | None = None

    def render(self, row: Row) -> Rendered:
        """Render one row.

        Raises DataError where the chat template refuses it or cannot tell who wrote what, UsageError where the
        tokenizer has no EOS token or no chat template and the row needs one.
        """
        content = row.content
        if isinstance(content, TextRow):
            return Rendered(self._ended(content.text), None, True)
        if isinstance(content, CompletionRow):
            text = content.prompt + self._ended(content.completion)
            # One past the end: an EOS that the tokenizer itself adds lies behind the last character.
            spans = [(len(content.prompt), len(text) + 1)] if self._loss_on is LossOn.COMPLETIONS else None
            return Rendered(text, spans, True)
        return self._render_chat(content, row)

    def _render_chat(self, content: ChatRow, row: Row) -> Rendered:
        if self._conversations is None:
            self._conversations = Conversations.of(self._tokenizer)
        if self._loss_on is LossOn.COMPLETIONS and content.n_prompt is None:
            text, spans = self._conversations.render_with_spans(content, row.place)
            return Rendered(text, spans, False)
        text = self._conversations.render(content, row.place)
        if self._loss_on is LossOn.ALL:
            return Rendered(text, None, False)
        return Rendered(text, [(self._conversations.completion_start(content, text, row.place), len(text))], False)

    def _ended(self, text: str) -> str:
        eos = self._tokenizer.eos_token
        if not isinstance(eos, str):
            raise UsageError(
                f"{self._tokenizer.name_or_path or 'the tokenizer'}: has no EOS token, with which every plain text "
                "ends. Set tokenizer.eos_token"
            )
        return text if text.endswith(eos) else text + eos
