"""Makes text from files and servers safe to print.

A terminal obeys control characters: they move the cursor, change the title, hide a line or fake one. Characters that
set the direction of text make a name look like another one.
"""

from __future__ import annotations

import re

_CONTROL = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1
    "\u2028\u2029"  # line and paragraph separator
    "\u202a-\u202e\u2066-\u2069"  # embeddings, overrides and isolates of the direction
    "\ud800-\udfff"  # surrogates, which stand for bytes of file names that are not UTF-8
)
_UNSAFE = re.compile(f"[{_CONTROL}]")
_UNSAFE_IN_A_LINE = re.compile(f"[\t\n{_CONTROL}]")

MAX_CHARACTERS = 1200
"""Length of the longest part of a message."""

MAX_CHARACTERS_OF_A_NAME = 512
"""Length of the longest name of a file, tensor or field in a message."""


def printable(text: str) -> str:
    """Return a text with escapes such as `\\x1b` in the place of control characters. Tabs and line ends stay."""
    return _UNSAFE.sub(_escaped, text)


def one_line(text: str) -> str:
    """Return a text with escapes in the place of control characters, tabs and line ends."""
    return _UNSAFE_IN_A_LINE.sub(_escaped, text)


def shown(text: str, *, max_characters: int = MAX_CHARACTERS) -> str:
    """Return a text as it stands in a message: on one line, without its middle if it is long.

    Args:
        text: Any text.
        max_characters: Number of characters that are shown.
    """
    return one_line(shortened(text, max_characters))


def shortened(text: str, max_characters: int) -> str:
    """Return a text without its middle if it is long.

    Args:
        text: Any text.
        max_characters: Number of characters that are kept.
    """
    if len(text) <= max_characters:
        return text
    n_last = max_characters // 3
    return f"{text[: max_characters - n_last]} ... ({len(text):,} characters) ... {text[-n_last:]}"


def as_json(text: str) -> str:
    """Return a JSON text with JSON's escapes in the place of control characters, which occur only in its strings."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
