"""Reads the entries of a JSON array from a file, one at a time. Memory use does not grow with the size of the file."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from qformat.training.data.place import BadRow, Place

_READ_CHARACTERS = 2**20
_SPACES = " \t\r\n"


def is_array(path: Path) -> bool:
    """Return whether the text of a file begins with the bracket of a JSON array."""
    with path.open("rb") as file:
        start = file.read(2**12)
    return start.removeprefix(BOM_UTF8).lstrip()[:1] == b"["


def array_entries(path: Path, max_entry_nbytes: int) -> Iterator[tuple[Place, bytes]]:
    """Yield the place and the JSON text of every entry.

    Args:
        path: File that holds one JSON array.
        max_entry_nbytes: Largest size of an entry in bytes.

    Yields:
        The place of the entry and its text, which need not be strict JSON.

    Raises:
        DataError: The text is not one array, or an entry is too large.
    """
    # Bytes that are not UTF-8 pass through, so that the entry with them is rejected.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text = _Text(file, path, max_entry_nbytes)
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
        self._decoder = json.JSONDecoder()

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
        """Pass over a value and return its text."""
        self.next_is("")
        while True:
            try:
                _, stop = self._decoder.raw_decode(self._held, self._position)
            except json.JSONDecodeError as problem:
                if len(self._held) - self._position > self._limit:
                    Place(self._path, "entry", number).refuse(
                        BadRow.TOO_LARGE, f"is longer than {self._limit} bytes, the limit of an entry"
                    )
                if not self._read_more():
                    self._refuse(number, problem.msg)
            except RecursionError:
                self._refuse(number, "the values are nested too deeply")
            else:
                # A number may continue in the next part of the file.
                if stop < len(self._held) or not self._read_more():
                    found = self._held[self._position : stop]
                    self._position = stop
                    return found.encode("utf-8", errors="surrogateescape")

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
