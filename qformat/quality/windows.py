"""Data files as token windows of one length, which quality is measured on and tuning uses.

A file of plain text is one stream of tokens. The rows of JSON Lines and Parquet files (text, prompt and completion,
conversations) are rendered as for training and concatenated. The stream is cut into windows without overlap; the
remainder at its end is dropped. If the tokenizer begins a text with BOS, so does every window. Of a text with far more
tokens than are needed, a part is read (`qformat.quality.token_stream`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qformat.errors import DataError, UsageError
from qformat.quality.token_stream import PIECE_CHARACTERS, TokenStream
from qformat.training.data.reading.sources import Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

KEPT_TOKENS = 2**21
"""Number of tokens of a text from which on only a part of it is tokenised: about 8 MB of text."""


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows of a text.

    Attributes:
        parts: The files, directories or dataset names that the user gave.
        ids: Token ids, int32 [n_windows, length].
        numbers: Index of each window among all that were read, int64 [n_windows].
        sha256: SHA-256 of the data: the bytes of its files, concatenated.
    """

    parts: tuple[str, ...]
    ids: NDArray[np.int32]
    numbers: NDArray[np.int64]
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def name(self) -> str:
        """Name of the text, for messages."""
        return ", ".join(self.parts)

    @property
    def length(self) -> int:
        """Number of tokens per window."""
        return int(self.ids.shape[1])

    def spread(self, count: int) -> TokenWindows:
        """Return `count` windows evenly spaced over the text, or all if there are fewer."""
        count = min(count, len(self))
        return self._take((2 * np.arange(count) + 1) * len(self) // (2 * max(count, 1)))

    def sample(self, count: int, *, seed: int) -> TokenWindows:
        """Return `count` randomly chosen windows in random order, or all if there are fewer.

        Args:
            count: Number of windows.
            seed: Seed of the random choice.
        """
        return self._take(np.random.default_rng(seed).permutation(len(self))[:count])

    def hold_out(self, count: int) -> tuple[TokenWindows, TokenWindows]:
        """Split off `count` windows evenly spaced over the text.

        Returns:
            The remaining windows and the held-out ones.

        Raises:
            UsageError: No window would remain.
        """
        if count >= len(self):
            raise UsageError(
                f"{self.name}: contains {len(self)} windows of {self.length} tokens, but {count} would be held out. "
                "Give more text or use shorter windows"
            )
        held_out = self.spread(count)
        return self._take(np.flatnonzero(~np.isin(self.numbers, held_out.numbers))), held_out

    def _take(self, places: NDArray[np.int64]) -> TokenWindows:
        return replace(self, ids=self.ids[places], numbers=self.numbers[places])


def read_windows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    n_needed: int = 0,
    split: str = "train",
    kept_tokens: int = KEPT_TOKENS,
    piece_characters: int = PIECE_CHARACTERS,
) -> TokenWindows:
    """Read the windows of a text. The same data, tokenizer and number of windows give the same windows.

    Of a text of more than `kept_tokens` tokens, only a part is used. It is spread over the whole text, and is larger if
    many windows are needed.

    Args:
        source: A plain text file, or what `find_files` accepts: a file with rows, a directory of such files, a Hub
            dataset; or several of these, which are concatenated.
        tokenizer: The tokenizer of the model, which must be a fast one.
        length: Number of tokens per window, BOS included.
        n_needed: Number of windows that the caller needs.
        split: Split of a Hub dataset.
        kept_tokens: Largest number of tokens to keep if fewer than half of them are needed.
        piece_characters: Largest number of characters of a piece of plain text.

    Raises:
        DataError: A file was not fetched, is not valid UTF-8 or has an unusable row, or the text is shorter than one
            window.
        UsageError: The source does not exist, or the tokenizer is not a fast one.
    """
    if length < 2:
        raise UsageError(f"window length {length}: must be at least 2 tokens, because the first one is not predicted")
    parts = [source] if isinstance(source, (str, Path)) else list(source)
    # Dropping every second unit leaves half of the limit or more, unless the units differ much in size.
    limit = max(kept_tokens, 2 * n_needed * length)
    stream = TokenStream(tokenizer, limit=limit, piece_characters=piece_characters)
    for part in parts:
        stream.read(part, split=split)
    tokens = stream.tokens.joined()
    ids = cut(tokens, length, bos_id=_leading_bos(tokenizer, stream.backend))
    if not len(ids):
        raise DataError(
            "too_short",
            ", ".join(map(str, parts)),
            f"contains {len(tokens)} tokens, fewer than one window of {length}",
            place=None,
            next_step="Give more text or use shorter windows",
        )
    return TokenWindows(tuple(map(str, parts)), ids, np.arange(len(ids)), stream.sha256.hexdigest())


def cut(stream: NDArray[np.int32], length: int, *, bos_id: int | None) -> NDArray[np.int32]:
    """Cut a stream of tokens into windows. Each begins with BOS, which is added unless the text already has it there.

    Args:
        stream: Token ids, int32 [n_tokens].
        length: Number of tokens per window, BOS included.
        bos_id: Token id of BOS, or None to add none.

    Returns:
        Windows, int32 [n_windows, length].
    """
    windows = []
    start = 0
    while start < len(stream):
        begins = bos_id is not None and stream[start] != bos_id
        stop = start + length - begins
        if stop > len(stream):
            break
        windows.append(np.concatenate([[bos_id], stream[start:stop]]) if begins else stream[start:stop])
        start = stop
    return np.array(windows, np.int32).reshape(-1, length)


def _leading_bos(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> int | None:
    """Return the BOS token that the tokenizer puts at the start of a text, or None."""
    first = backend.encode("", add_special_tokens=True).ids[:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None
