"""Data files as one stream of tokens, in memory that does not grow with the files.

A file of plain text is read in pieces that end at line ends. Each piece, and each row of a file with rows, is a unit.
If a stream has more tokens than its limit, only every second unit is kept, or every fourth, and so on: the smallest
power of two with which the tokens fit. The units that are kept are spread over all the data, and the same data give the
same tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.digests import READ_NBYTES
from qformat.errors import DataError, UsageError
from qformat.named_files import open_named
from qformat.training.data.place import BadRow
from qformat.training.data.reading.read_rows import BadRows, read_rows
from qformat.training.data.reading.sources import DataFile, FileState, check_unchanged, find_files, refuse_stand_in
from qformat.training.data.render import LossOn, Rendered, Renderer
from qformat.training.data.rows import Row
from qformat.training.data.tokenise import in_batches, own_tokenizer, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
"""Suffixes of files with rows. All other files are plain text."""

PIECE_CHARACTERS = 2**20
"""Number of characters of a piece of plain text."""

_Unit = TypeVar("_Unit")


class ThinnedTokens:
    """Tokens of numbered units, of which every second is dropped whenever they are too many.

    Args:
        limit: Largest number of tokens to keep. A single unit is always kept.
    """

    def __init__(self, limit: int) -> None:
        self.stride = 1
        self._limit = limit
        self._units: list[NDArray[np.int32]] = []
        self._n_tokens = 0

    def wants(self, number: int) -> bool:
        """Return whether the unit of a number, from 0, is one of those that are kept."""
        return number % self.stride == 0

    def add(self, number: int, ids: NDArray[np.int32]) -> None:
        """Add the next unit, if it is one of those that are kept.

        Args:
            number: Number of the unit, from 0. Numbers ascend, and none that is wanted is left out.
            ids: Token ids of the unit.
        """
        if not self.wants(number):
            return
        self._units.append(ids)
        self._n_tokens += len(ids)
        while self._n_tokens > self._limit and len(self._units) > 1:
            self._units = self._units[::2]
            self._n_tokens = sum(map(len, self._units))
            self.stride *= 2

    def joined(self) -> NDArray[np.int32]:
        """Return the tokens of all units that are kept, int32 [n_tokens]."""
        return np.concatenate(self._units) if self._units else np.empty(0, np.int32)


class TokenStream:
    """Reads data files as one stream of tokens.

    Args:
        tokenizer: The tokenizer of the model, which must be a fast one.
        limit: Number of tokens from which on the data are thinned.
        piece_characters: Largest number of characters of a piece of plain text.

    Attributes:
        tokens: The tokens read so far.
        sha256: SHA-256 of the bytes of all files read so far.

    Raises:
        UsageError: The tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, limit: int, piece_characters: int) -> None:
        self.backend = own_tokenizer(tokenizer)
        self.tokens = ThinnedTokens(limit)
        self.sha256 = hashlib.sha256()
        self._tokenizer = tokenizer
        self._piece_characters = piece_characters
        self._numbers = count()

    def read(self, part: Path | str, *, split: str) -> None:
        """Add a plain text, or what `find_files` accepts.

        Args:
            part: A file, a directory of files with rows, or a Hub dataset.
            split: Split of a Hub dataset.

        Raises:
            DataError: A file is not valid UTF-8, or a row cannot be used.
            UsageError: The source does not exist or cannot be read.
        """
        path = Path(part)
        if path.suffix not in ROW_SUFFIXES and path.is_file():
            self._read_units(_pieces(self._texts(path), self._piece_characters), _as_texts)
            return
        files = find_files(part, split=split)
        states = [self._hashed(file) for file in files]
        self._read_units(read_rows(files, BadRows(skip=None)), self._rendered)
        for file, state in zip(files, states, strict=True):
            check_unchanged(file, state)

    def _read_units(self, units: Iterable[_Unit], render: Callable[[Iterator[_Unit]], Iterator[Rendered]]) -> None:
        """Add the tokens of all units that are wanted, as training sees them. Units may be read ahead."""
        numbers: deque[int] = deque()

        def wanted() -> Iterator[_Unit]:
            for unit in units:
                number = next(self._numbers)
                if self.tokens.wants(number):
                    numbers.append(number)
                    yield unit

        for batch in in_batches(render(wanted())):
            for example in tokenise(self.backend, batch, bos_id=self._tokenizer.bos_token_id):
                self.tokens.add(numbers.popleft(), example.ids)

    def _rendered(self, rows: Iterator[Row]) -> Iterator[Rendered]:
        for _, rendered in Renderer(self._tokenizer, LossOn.ALL).render_all(rows):
            if isinstance(rendered, DataError):
                raise rendered
            yield rendered

    def _texts(self, path: Path) -> Iterator[str]:
        """Yield a text in parts as they are read."""
        refuse_stand_in(path, is_text=True)
        decoder = codecs.getincrementaldecoder("utf-8")()
        n_read, mark = 0, "\ufeff"
        try:
            with open_named(path) as file:
                while True:
                    data = file.read(READ_NBYTES)
                    self.sha256.update(data)
                    undecoded = len(decoder.getstate()[0])
                    try:
                        text = decoder.decode(data, final=not data)
                    except UnicodeDecodeError as problem:
                        raise _not_utf8(path, n_read - undecoded + problem.start) from None
                    if text:
                        yield text.removeprefix(mark)  # a byte order mark
                        mark = ""
                    n_read += len(data)
                    if not data:
                        return
        except OSError as problem:
            raise _unreadable(path, problem) from None

    def _hashed(self, file: DataFile) -> FileState:
        """Add a file's bytes to the digest and return the state by which a later change is noticed."""
        try:
            with open_named(file.path) as opened:
                before = os.fstat(opened.fileno())
                while data := opened.read(READ_NBYTES):
                    self.sha256.update(data)
        except OSError as problem:
            raise _unreadable(file.path, problem) from None
        return FileState("", before.st_size, before.st_mtime_ns)


def _as_texts(pieces: Iterator[str]) -> Iterator[Rendered]:
    return (Rendered(piece, None, adds_special_tokens=False) for piece in pieces)


def _pieces(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Join parts of a text and split it into pieces of at most `characters`, at line ends if possible, so that few
    tokens are split.
    """
    held = ""
    for text in texts:
        held += text
        start = 0
        while len(held) - start > characters:
            stop = start + characters
            stop = (held.rfind("\n", start, stop) + 1) or stop
            yield held[start:stop]
            start = stop
        held = held[start:]
    if held:
        yield held


def _not_utf8(path: Path, position: int) -> DataError:
    return DataError(
        BadRow.NOT_UTF8,
        path,
        f"was read as plain text but is not valid UTF-8 (byte {position})",
        place=None,
        next_step=f"Convert it to UTF-8, or give it the suffix of its format: {', '.join(ROW_SUFFIXES)}",
    )


def _unreadable(path: Path, problem: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be read: {problem.strerror}. Check the path and its permissions")
