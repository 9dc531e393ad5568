"""Tokenises rendered texts and marks the tokens that are trained.

Each text is tokenised as a whole. The trained characters are then located by the offsets of the tokens, so that the
choice of trained characters never changes the tokens. A token that straddles the start of a span is trained, since its
last characters belong to the span.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from qformat.errors import ArtifactError, Reason, UsageError
from qformat.model.text.render_client import Span
from qformat.names import TOKENIZER_NAME
from qformat.training.data.render import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one example.

    Attributes:
        ids: Token ids, int32 (n,).
        trained: Whether each token is trained, bool (n,). False for the first token, because nothing predicts it.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


def own_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the underlying fast tokenizer, without the truncation and padding that other callers set on it.

    Raises:
        UsageError: The tokenizer is not a fast one. Only fast tokenizers report the offsets of tokens in the text.
        ArtifactError: Its vocabulary and its merges contradict each other.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: is not a fast tokenizer. "
            f"Convert it, so that the folder has a {TOKENIZER_NAME}"
        )
    try:
        copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as problem:  # tokenizers raises plain Exception
        raise ArtifactError(
            Reason.CONFIG_FIELD,
            Path(tokenizer.name_or_path) / TOKENIZER_NAME,
            f"contradicts itself: {str(problem).partition(chr(10))[0]}",
            next_step="Get the tokenizer's files again",
        ) from problem
    copy.no_truncation()
    copy.no_padding()
    return copy


def in_batches(texts: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Yield texts in batches that use all cores and little memory. No batch is empty."""
    batch: list[Rendered] = []
    n_characters = 0
    for rendered in texts:
        batch.append(rendered)
        n_characters += len(rendered.text)
        if len(batch) >= _BATCH_ROWS or n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def tokenise(tokenizer: Tokenizer, batch: list[Rendered], *, bos_id: int | None) -> list[Tokens]:
    """Tokenise a batch of texts on all cores.

    Args:
        tokenizer: Tokenizer without truncation and padding (`own_tokenizer`).
        batch: Texts to tokenise.
        bos_id: Id of the BOS token, with which a text must not begin twice. None if there is none.

    Returns:
        The tokens of each text.
    """
    done: list[Tokens | None] = [None] * len(batch)
    for adds_special_tokens in (False, True):
        for needs_offsets in (False, True):
            chosen = [
                index
                for index, rendered in enumerate(batch)
                if (rendered.adds_special_tokens, rendered.spans is not None) == (adds_special_tokens, needs_offsets)
            ]
            # The fast variant does not compute offsets.
            encode = tokenizer.encode_batch if needs_offsets else tokenizer.encode_batch_fast
            encodings = encode([batch[index].text for index in chosen], add_special_tokens=adds_special_tokens)
            for index, encoding in zip(chosen, encodings, strict=True):
                done[index] = _tokens(encoding, batch[index], bos_id)
    return [tokens for tokens in done if tokens is not None]


def _tokens(encoding: Encoding, rendered: Rendered, bos_id: int | None) -> Tokens:
    ids = np.array(encoding.ids, np.int32)
    trained = np.ones(len(ids), np.bool_) if rendered.spans is None else trained_tokens(encoding, rendered.spans)
    if rendered.adds_special_tokens and len(ids) > 1 and ids[0] == ids[1] == bos_id:
        ids, trained = ids[1:], trained[1:]
    trained[:1] = False
    return Tokens(ids, trained)


def trained_tokens(encoding: Encoding, spans: list[Span]) -> NDArray[np.bool_]:
    """Return which tokens hold characters of the spans.

    Args:
        encoding: Tokens of one text, with their offsets.
        spans: Ranges of characters, in ascending order.

    Returns:
        True for each token that overlaps a span, bool (n,).
    """
    trained = np.zeros(len(encoding.ids), np.bool_)
    if not spans or not len(trained):
        return trained
    offsets = np.array(encoding.offsets, np.int64)  # (n, 2), in characters
    # Tokens that the tokenizer adds around the text have the offsets (0, 0). Let them end where their neighbour ends.
    ends = np.maximum.accumulate(offsets[:, 1])
    # Some tokenizers exclude leading spaces from the offsets. Let each token start where the previous one ends.
    starts = np.where(np.array(encoding.special_tokens_mask, np.bool_), ends, offsets[:, 0])
    starts[1:] = np.minimum(starts[1:], ends[:-1])
    starts = np.maximum.accumulate(starts)
    for start, stop in spans:
        first = np.searchsorted(ends, start, side="right")
        last = np.searchsorted(starts, stop, side="left")
        trained[first:last] = True
    return trained
