"""Reads the entries of a JSON array from a file, one at a time. Memory use does not grow with the size of the file."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from qformat.strict_json import MIN_NBYTES_PER_VALUE
from qformat.training.data.place import BadRow, Place, refuse_large

_READ_CHARACTERS = 2**20
_SPACES = " \t\r\n"

# Possessive quantifiers save memory: a greedy loop would need about 100 bytes for every character of a string.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+(?P<end>"?)|[\[\]{}]', re.DOTALL)
_END_OF_SCALAR = re.compile(r"[\s,\[\]{}]")
_DEPTH = {"[": 1, "{": 1, "]": -1, "}": -1}


def is_array(path: Path) -> bool:
    """Return whether the text of a file begins with the bracket of a JSON array."""
    with path.open("rb") as file:
        start = file.read(2**12)
    return start.removeprefix(BOM_UTF8).lstrip()[:1] == b"["


def array_entries(path: Path, max_row_nbytes: int) -> Iterator[tuple[Place, bytes]]:
    """Yield the place and the JSON text of every entry.

    Args:
        path: File that holds one JSON array.
        max_row_nbytes: Largest size of an entry in bytes.

    Yields:
        The place of the entry and its text, which need not be strict JSON.

    Raises:
        DataError: The text is not one array, or an entry is too large.
    """
    # Bytes that are not UTF-8 pass through, so that the entry with them is rejected.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text = _Text(file, path, max_row_nbytes)
        number = 1
        text.expect("[", number)
        if text.next_is("]"):
            text.expect("]", number)
        else:
            while True:
                yield Place(path, "entry", number), text.entry(number)
                if not text.next_is(","):
                    break
                text.expect(",", number)
                number += 1
            text.expect("]", number)
        text.expect("", number)


class _Text:
    """A text of which a part is in memory.

    Args:
        file: The open file.
        path: Path of the file, for messages.
        limit: Largest size of an entry in bytes.
    """

    def __init__(self, file: TextIO, path: Path, limit: int) -> None:
        self._file = file
        self._path = path
        self._limit = limit
        self._held = ""
        self._position = 0

    def next_is(self, mark: str) -> bool:
        """Return whether a character follows, after spaces. The empty string stands for the end."""
        while True:
            while self._position < len(self._held) and self._held[self._position] in _SPACES:
                self._position += 1
            if self._position < len(self._held) or not self._read_more():
                return self._held[self._position : self._position + 1] == mark

    def expect(self, mark: str, number: int) -> None:
        """Pass over a character, or raise an error that names the entry."""
        if not self.next_is(mark):
            wanted = f"expected {mark!r}" if mark else "expected nothing after the list"
            self._refuse(number, f"{wanted}, got {self._held[self._position : self._position + 20]!r}")
        self._position += len(mark)

    def entry(self, number: int) -> bytes:
        """Pass over a value and return its text. The value itself is not built, which could need much more memory."""
        if self.next_is("") or self._held[self._position] in "]},:":
            self._refuse(number, "expected a value")
        is_scalar = self._held[self._position] not in '"[{'
        stop = self._end_of_scalar(number) if is_scalar else self._end_of_value(number)
        if stop - self._position > self._limit:
            refuse_large(Place(self._path, "entry", number), self._limit)
        found = self._held[self._position : stop]
        self._position = stop
        return found.encode("utf-8", errors="surrogateescape")

    def _end_of_scalar(self, number: int) -> int:
        while (found := _END_OF_SCALAR.search(self._held, self._position)) is None:
            if not self._read_more_of_entry(number):
                return len(self._held)
        return found.start()

    def _end_of_value(self, number: int) -> int:
        depth = n_brackets = done = 0
        while True:
            for mark in _STRING_OR_BRACKET.finditer(self._held, self._position + done):
                if mark["end"] == "":  # the string continues in the next part of the file
                    break
                done = mark.end() - self._position
                depth += _DEPTH.get(mark[0], 0)
                if depth == 0:
                    return mark.end()
                n_brackets += 1
                if n_brackets * MIN_NBYTES_PER_VALUE > 2 * max(self._limit, 2**16):
                    Place(self._path, "entry", number).refuse(BadRow.TOO_LARGE, "has too many lists and objects")
            if not self._read_more_of_entry(number):
                self._refuse(number, "the file ends inside this entry")

    def _read_more_of_entry(self, number: int) -> bool:
        if len(self._held) - self._position > self._limit:
            refuse_large(Place(self._path, "entry", number), self._limit)
        return self._read_more()

    def _read_more(self) -> bool:
        rest = self._held[self._position :]
        more = self._file.read(max(_READ_CHARACTERS, len(rest)))
        self._held, self._position = rest + more, 0
        return bool(more)

    def _refuse(self, number: int, problem: str) -> None:
        Place(self._path, "entry", number).refuse(
            BadRow.DAMAGED_FILE,
            f"the JSON list cannot be read: {problem}",
            next_step="Correct the file, or write one object per line",
        )
