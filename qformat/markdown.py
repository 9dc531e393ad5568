"""Markdown of cards: tables, links, metadata, and the escaping of text that comes from files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"[\\`*\[\]|~$!{}#@]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/|(?<=\])\(|(?<=www)\.", re.IGNORECASE)
"""Characters that may begin markup. An underscore inside of a word does not, and names of files look better without."""

_IN_METADATA = re.compile(r"[<>&|`*\[\]$#!]")
"""Characters that are written as escapes of YAML in metadata, which is possible between double quotes only."""

_ONE_LINE = 2**31
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
    """Return the metadata at the beginning of a card. For readers that do not know it, no value of it is markup.

    Args:
        fields: Value per field.
    """
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: object) -> bool:
            return True

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _IN_METADATA.search(text) else None)

    Dumper.add_representer(str, represent)
    text = yaml.dump(dict(fields), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=_ONE_LINE)
    return "---\n" + _IN_METADATA.sub(lambda found: f"\\x{ord(found[0]):02X}", text) + "---"
