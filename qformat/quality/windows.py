"""Data files as token windows of one length, which quality is measured on and tuning uses.

A file of plain text is one stream of tokens. The rows of JSON Lines and Parquet files (text, prompt and completion,
conversations) are rendered as for training and concatenated. The stream is cut into windows without overlap; the
remainder at its end is dropped. If the tokenizer begins a text with BOS, so does every window.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.digests import READ_NBYTES
from qformat.errors import DataError, UsageError
from qformat.training.data.place import BadRow
from qformat.training.data.reading.read_rows import BadRows, read_rows
from qformat.training.data.reading.sources import DataFile, FileState, Source, check_unchanged, find_files
from qformat.training.data.render import LossOn, Rendered, Renderer
from qformat.training.data.tokenise import own_tokenizer, tokenise

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
"""Suffixes of files with rows. All other files are plain text."""

PIECE_CHARACTERS = 2**20
"""Number of characters of plain text to tokenise at a time. A piece ends at a line end and needs about 50 MB."""

_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows of a text.

    Attributes:
        parts: The files, directories or dataset names that the user gave.
        ids: Token ids, int32 [n_windows, length].
        numbers: Index of each window in the whole text, int64 [n_windows].
        sha256: SHA-256 of the data: the bytes of its files, concatenated.
        n_tokens: Number of tokens in the whole text.
    """

    parts: tuple[str, ...]
    ids: NDArray[np.int32]
    numbers: NDArray[np.int64]
    sha256: str
    n_tokens: int

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
    split: str = "train",
    piece_characters: int = PIECE_CHARACTERS,
) -> TokenWindows:
    """Read all windows of a text. The same data and tokenizer give the same windows. Needs 4 bytes of memory per token.

    Args:
        source: A plain text file, or what `find_files` accepts: a file with rows, a directory of such files, a Hub
            dataset; or several of these, which are concatenated.
        tokenizer: The tokenizer of the model, which must be a fast one.
        length: Number of tokens per window, BOS included.
        split: Split of a Hub dataset.
        piece_characters: Number of characters of plain text to tokenise at a time.

    Raises:
        DataError: A file is not valid UTF-8, a row cannot be used, or the text is shorter than one window.
        UsageError: The source does not exist, or the tokenizer is not a fast one.
    """
    if length < 2:
        raise UsageError(f"window length {length}: must be at least 2 tokens, because the first one is not predicted")
    backend = own_tokenizer(tokenizer)
    parts = [source] if isinstance(source, (str, Path)) else list(source)
    sha256 = hashlib.sha256()
    streams = []
    for part in parts:
        if _is_plain_text(Path(part)):
            streams.append(_text_stream(Path(part), backend, sha256, piece_characters))
        else:
            streams.append(_row_stream(find_files(part, split=split), tokenizer, backend, sha256))
    stream = _joined(streams)
    ids = cut(stream, length, bos_id=_leading_bos(tokenizer, backend))
    if not len(ids):
        raise DataError(
            "too_short",
            ", ".join(map(str, parts)),
            f"contains {len(stream)} tokens, fewer than one window of {length}",
            place=None,
            next_step="Give more text or use shorter windows",
        )
    return TokenWindows(tuple(map(str, parts)), ids, np.arange(len(ids)), sha256.hexdigest(), len(stream))


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


def _is_plain_text(path: Path) -> bool:
    return path.suffix not in ROW_SUFFIXES and path.is_file()


def _text_stream(path: Path, backend: Tokenizer, sha256: hashlib._Hash, piece_characters: int) -> NDArray[np.int32]:
    """Return the tokens of a file without special tokens, and add its bytes to a digest."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise UsageError(f"{path}: cannot be read: {problem.strerror}. Check the path and its permissions") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise DataError(
            BadRow.NOT_UTF8,
            path,
            f"was read as plain text but is not valid UTF-8 (byte {problem.start})",
            place=None,
            next_step=f"Convert it to UTF-8, or give it the suffix of its format: {', '.join(ROW_SUFFIXES)}",
        ) from None
    tokens = [
        np.array(backend.encode(piece, add_special_tokens=False).ids, np.int32)
        for piece in _pieces(text, piece_characters)
    ]
    sha256.update(data)
    return _joined(tokens)


def _pieces(text: str, characters: int) -> Iterator[str]:
    """Split a text into pieces of at most `characters`, at line ends if possible, so that few tokens are split."""
    start = 0
    while start < len(text):
        stop = start + characters
        if stop < len(text):
            stop = (text.rfind("\n", start, stop) + 1) or stop
        yield text[start:stop]
        start = stop


def _row_stream(
    files: list[DataFile], tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, sha256: hashlib._Hash
) -> NDArray[np.int32]:
    """Return the tokens of all rows as training sees them, and add the files' bytes to a digest."""
    states = [_hashed(file, sha256) for file in files]
    tokens = [
        example.ids
        for batch in _rendered(files, Renderer(tokenizer, LossOn.ALL))
        for example in tokenise(backend, batch, bos_id=tokenizer.bos_token_id)
    ]
    for file, state in zip(files, states, strict=True):
        check_unchanged(file, state)
    return _joined(tokens)


def _rendered(files: list[DataFile], renderer: Renderer) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    for _, rendered in renderer.render_all(read_rows(files, BadRows(skip=None))):
        if isinstance(rendered, DataError):
            raise rendered
        batch.append(rendered)
        if len(batch) >= _BATCH_ROWS:
            yield batch
            batch = []
    yield batch


def _hashed(file: DataFile, sha256: hashlib._Hash) -> FileState:
    """Add a file's bytes to a digest and return the state by which a later change is noticed."""
    try:
        with file.path.open("rb") as opened:
            before = os.fstat(opened.fileno())
            while data := opened.read(READ_NBYTES):
                sha256.update(data)
    except OSError as problem:
        raise UsageError(f"{file.path}: cannot be read: {problem.strerror}. Check its permissions") from None
    return FileState("", before.st_size, before.st_mtime_ns)


def _leading_bos(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> int | None:
    """Return the BOS token that the tokenizer puts at the start of a text, or None."""
    first = backend.encode("", add_special_tokens=True).ids[:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None


def _joined(tokens: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(tokens) if tokens else np.empty(0, np.int32)
