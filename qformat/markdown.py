"""Markdown of cards: tables, links, metadata, and the escaping of text that comes from files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"[\\`*\[\]|~$!{}#@]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/|(?<=www)\.", re.IGNORECASE)
"""Characters that may begin markup. An underscore inside of a word does not, and names of files look better without."""

_SAFE_IN_ADDRESSES = "/:?&=#%+,;@~-._"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown.

    Args:
        header: Titles of the columns, as Markdown.
        rows: Rows of cells, as Markdown.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Return text as Markdown of one line that shows it, in a paragraph, a heading or a cell of a table.

    No text ends the line or the cell, or starts markup, HTML, a link or a formula.
    """
    shown = _MARKUP.sub(r"\\\g<0>", printable(text))
    return "".join(_ENTITIES.get(character, character) for character in shown)


def printable(text: str) -> str:
    """Return text with spaces in place of control characters and the like, which could change the order of the text."""
    return "".join(character if character.isprintable() else " " for character in text)


def link(text: str, address: str) -> str:
    """Return a link to a web page or to a file beside the card, or only its text if the address is of another kind.

    Args:
        text: Text of the link, not escaped.
        address: Address, not escaped.
    """
    try:
        parts = urlsplit(address)
    except ValueError:  # not a valid address, such as http://[
        return escaped(text)
    if parts.scheme not in {"", "http", "https"} or not address.isprintable() or (parts.netloc and not parts.scheme):
        return escaped(text)
    return f"[{escaped(text)}]({quote(address, safe=_SAFE_IN_ADDRESSES)})"


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return the metadata at the beginning of a card.

    Args:
        fields: Value per field.
    """
    import yaml

    text = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, line_break="\n")
    return f"---\n{text}---"
