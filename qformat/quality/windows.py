"""Data files as windows of tokens, all of one length: what quality is measured on and tuned by.

A file of plain text is one stream of tokens. The rows of JSON lines and Parquet files (text, prompt and completion,
conversations) are rendered as for training, and follow one another. The stream is cut into windows without overlap;
what is left at its end is dropped. Where the tokenizer begins a text with BOS, so does every window.
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
from qformat.training.data.reading.read_rows import BadRows, read_rows
from qformat.training.data.reading.rows import BadRow
from qformat.training.data.reading.sources import DataFile, FileState, Source, check_unchanged, find_files
from qformat.training.data.render import LossOn, Rendered, Renderer
from qformat.training.data.tokenise import own_tokenizer, tokenise

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
"""Files of other names are plain text."""

PIECE_CHARACTERS = 2**20
"""Of a plain text that are tokenised at a time: a piece ends with a line, and takes some 50 MB meanwhile."""

_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows of a text. parts: the files, folders or names that it was given as.

    ids: int32 [n_windows, length]. numbers: int64 [n_windows], which windows of the whole text they are, from 0.
    sha256: of the bytes of the data, its files one after the other. n_tokens: of the whole text.
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
        """The text, for messages."""
        return ", ".join(self.parts)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return int(self.ids.shape[1])

    def spread(self, count: int) -> TokenWindows:
        """Return `count` windows, or all if there are fewer, at even distances over the text."""
        count = min(count, len(self))
        return self._take((2 * np.arange(count) + 1) * len(self) // (2 * max(count, 1)))

    def sample(self, count: int, *, seed: int) -> TokenWindows:
        """Return `count` windows, or all if there are fewer, chosen and ordered by chance."""
        return self._take(np.random.default_rng(seed).permutation(len(self))[:count])

    def hold_out(self, count: int) -> tuple[TokenWindows, TokenWindows]:
        """Return the others, and `count` windows at even distances over the text.

        Raises UsageError where no other would be left.
        """
        if count >= len(self):
            raise UsageError(
                f"{self.name}: {len(self)} windows of {self.length} tokens, and {count} would be held out. "
                "Give more text, or make the windows shorter"
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
    """Read all windows of a text. Same data and tokenizer, same windows. Memory: four bytes a token.

    source: a file of plain text, or what `find_files` takes: a file with rows, a folder of them, a dataset of the Hub;
        or several of these, which follow one another.
    length: tokens of a window, BOS included. piece_characters: of a plain text that are tokenised at a time.
    Raises DataError for a file that is no UTF-8, a row that cannot be used, and for less than one window of text;
        UsageError for a source that is not there, or a tokenizer that is no fast one.
    """
    if length < 2:
        raise UsageError(f"windows of {length} token(s): at least 2 are needed, since the first one predicts nothing")
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
            f"{len(stream)} tokens, which is less than one window of {length}",
            place=None,
            next_step="Give more text, or shorter windows",
        )
    return TokenWindows(tuple(map(str, parts)), ids, np.arange(len(ids)), sha256.hexdigest(), len(stream))


def cut(stream: NDArray[np.int32], length: int, *, bos_id: int | None) -> NDArray[np.int32]:
    """Cut int32 (n_tokens,) into windows, int32 [n_windows, length], each begun with BOS unless its text brings it."""
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
    """Return the tokens of a file, without special ones, and add its bytes to a digest."""
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
            f"is read as plain text, and is not UTF-8 at byte {problem.start}",
            place=None,
            next_step=f"Convert it, or give it the suffix of what it is: {', '.join(ROW_SUFFIXES)}",
        ) from None
    tokens = [
        np.array(backend.encode(piece, add_special_tokens=False).ids, np.int32)
        for piece in _pieces(text, piece_characters)
    ]
    sha256.update(data)
    return _joined(tokens)


def _pieces(text: str, characters: int) -> Iterator[str]:
    """Cut a text into pieces of at most so many characters, at line ends, so that hardly a token is cut in two."""
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
    """Return the tokens of all rows, as training would see them, and add the files' bytes to a digest."""
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
    for row in read_rows(files, BadRows(skip=False)):
        batch.append(renderer.render(row))
        if len(batch) >= _BATCH_ROWS:
            yield batch
            batch = []
    yield batch


def _hashed(file: DataFile, sha256: hashlib._Hash) -> FileState:
    """Add a file's bytes to a digest and return by what a later change is noticed."""
    try:
        with file.path.open("rb") as opened:
            before = os.fstat(opened.fileno())
            while data := opened.read(READ_NBYTES):
                sha256.update(data)
    except OSError as problem:
        raise UsageError(f"{file.path}: cannot be read: {problem.strerror}. Check its permissions") from None
    return FileState("", before.st_size, before.st_mtime_ns)


def _leading_bos(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> int | None:
    """Return the BOS with which the tokenizer begins a text, None where it does not."""
    first = backend.encode("", add_special_tokens=True).ids[:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None


def _joined(tokens: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(tokens) if tokens else np.empty(0, np.int32)
