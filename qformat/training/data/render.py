"""Renders a row as text and marks the characters that are trained.

The result is the same as that of trl's SFTTrainer. A `text` or a plain `completion` gets an EOS token unless it ends
with one, and the tokenizer adds its special tokens (BOS). A conversation is rendered by the chat template, and nothing
is added. There is one difference: a text that starts with a BOS token does not get a second one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from qformat.errors import DataError, UsageError
from qformat.model.text.render_client import Span
from qformat.model.text.rendering import Steps, run_together
from qformat.training.data.chat.spans import Conversations
from qformat.training.data.rows import ChatRow, CompletionRow, Content, Row, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ROWS_AT_ONCE = 128
_CHARACTERS_AT_ONCE = 2**20


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
            DataError: The chat template fails for it, or the turns of the assistant cannot be located in its output.
            UsageError: It needs an EOS token or a chat template, and the tokenizer has none.
            ArtifactError: The chat template exceeds a limit.
        """
        ((_, rendered),) = self.render_all([row])
        if isinstance(rendered, DataError):
            raise rendered
        return rendered

    def render_all(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Rendered | DataError]]:
        """Render rows, many at a time.

        Args:
            rows: Rows, possibly read while the earlier ones are rendered. An error of reading is raised in its place.

        Yields:
            Each row in order, with what it was rendered to, or with the error that the chat template fails for it or
            that the turns of the assistant cannot be located in its output.

        Raises:
            UsageError: A row needs an EOS token or a chat template, and the tokenizer has none.
            ArtifactError: The chat template exceeds a limit.
        """
        groups: deque[list[Row]] = deque()

        def tasks() -> Iterator[list[Steps[Rendered]]]:
            for group in _groups(rows):
                groups.append(group)
                yield [self._steps(row) for row in group]

        for outcomes in run_together(tasks()):
            yield from zip(groups.popleft(), outcomes, strict=True)

    def _steps(self, row: Row) -> Steps[Rendered]:
        content = row.content
        if isinstance(content, TextRow):
            return Rendered(self._ended(content.text), None, True)
        if isinstance(content, CompletionRow):
            text = content.prompt + self._ended(content.completion)
            # The span ends one past the text, because an EOS that the tokenizer adds follows the last character.
            spans = [(len(content.prompt), len(text) + 1)] if self._loss_on is LossOn.COMPLETIONS else None
            return Rendered(text, spans, True)
        return (yield from self._chat_steps(content, row))

    def _chat_steps(self, content: ChatRow, row: Row) -> Steps[Rendered]:
        if self._conversations is None:
            self._conversations = Conversations(self._tokenizer)
        conversations = self._conversations
        if self._loss_on is LossOn.COMPLETIONS and content.n_prompt is None:
            text, spans = yield from conversations.render_with_spans(content, row.place)
            return Rendered(text, spans, False)
        text = yield from conversations.render(content, row.place)
        if self._loss_on is LossOn.ALL:
            return Rendered(text, None, False)
        start = yield from conversations.completion_start(content, text, row.place)
        return Rendered(text, [(start, len(text))], False)

    def _ended(self, text: str) -> str:
        eos = self._tokenizer.eos_token
        if not isinstance(eos, str):
            raise UsageError(
                f"{self._tokenizer.name_or_path or 'the tokenizer'}: has no EOS token, which must end every plain "
                "text. Set tokenizer.eos_token"
            )
        return text if text.endswith(eos) else text + eos


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Divide rows into groups of limited size. An error of reading is raised after the rows before it."""
    group: list[Row] = []
    n_characters = 0
    try:
        for row in rows:
            group.append(row)
            n_characters += _n_characters(row.content)
            if len(group) >= _ROWS_AT_ONCE or n_characters >= _CHARACTERS_AT_ONCE:
                yield group
                group, n_characters = [], 0
    except DataError:
        yield group
        raise
    yield group


def _n_characters(content: Content) -> int:
    if isinstance(content, TextRow):
        return len(content.text)
    if isinstance(content, CompletionRow):
        return len(content.prompt) + len(content.completion)
    return sum(len(text) for message in content.messages for text in message.values() if isinstance(text, str))
