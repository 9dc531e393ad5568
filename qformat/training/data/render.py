"""Renders a row as text and marks the characters that are trained.

The result is the same as that of trl's SFTTrainer. A `text` or a plain `completion` gets an EOS token unless it ends
with one, and the tokenizer adds its special tokens (BOS). A conversation is rendered by the chat template, and nothing
is added. There is one difference: a text that starts with a BOS token does not get a second one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from qformat.errors import UsageError
from qformat.training.data.chat.spans import Conversations, Span
from qformat.training.data.rows import ChatRow, CompletionRow, Row, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LossOn(StrEnum):
    """Which tokens are trained: those of completions and assistant turns, or all. A plain `text` is trained in full."""

    COMPLETIONS = "completions"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to tokenise.

    Attributes:
        text: The text.
        spans: Ranges of characters that are trained, in ascending order. None to train all tokens.
        adds_special_tokens: Whether the tokenizer adds its special tokens, as it does for plain text.
    """

    text: str
    spans: list[Span] | None
    adds_special_tokens: bool


class Renderer:
    """Renders rows for one tokenizer.

    Args:
        tokenizer: Tokenizer with its chat template.
        loss_on: Which tokens are trained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._conversations: Conversations | None = None

    def render(self, row: Row) -> Rendered:
        """Render one row.

        Raises:
            DataError: The chat template fails, or the turns of the assistant cannot be located in its output.
            UsageError: The row needs an EOS token or a chat template, and the tokenizer has none.
        """
        content = row.content
        if isinstance(content, TextRow):
            return Rendered(self._ended(content.text), None, True)
        if isinstance(content, CompletionRow):
            text = content.prompt + self._ended(content.completion)
            # The span ends one past the text, because an EOS that the tokenizer adds follows the last character.
            spans = [(len(content.prompt), len(text) + 1)] if self._loss_on is LossOn.COMPLETIONS else None
            return Rendered(text, spans, True)
        return self._render_chat(content, row)

    def _render_chat(self, content: ChatRow, row: Row) -> Rendered:
        if self._conversations is None:
            self._conversations = Conversations(self._tokenizer)
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
                f"{self._tokenizer.name_or_path or 'the tokenizer'}: has no EOS token, which must end every plain "
                "text. Set tokenizer.eos_token"
            )
        return text if text.endswith(eos) else text + eos
