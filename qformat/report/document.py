"""The frame that all pages share: one self-contained HTML document that loads nothing from elsewhere.

All text from files is escaped with `html.escape`. A content security policy allows only the page's own style sheet and
script, by their SHA-256, and forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from qformat.artifact.writing.disk import Disk
from qformat.report.appearance import SORT_SCRIPT, STYLE


def document(name: str, kind: str, sections: Sequence[str]) -> str:
    """Return a page as HTML.

    Args:
        name: Name of the artifact or adapter, unescaped: the heading.
        kind: Kind of report, such as "verification report": the line below the heading.
        sections: Body of the page as HTML. Empty sections are left out.
    """
    policy = f"default-src 'none'; style-src {_source_of(STYLE)}; script-src {_source_of(SORT_SCRIPT)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: qformat {kind}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(name)}</h1>\n<p class="muted">qformat {kind}</p>\n'
        + "\n".join(section for section in sections if section)
        + f"\n<script>{SORT_SCRIPT}</script>\n</body>\n</html>\n"
    )


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Return a grid of key figures as HTML.

    Args:
        figures: Each value with its meaning, both as HTML.
    """
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{meaning}</span></div>' for value, meaning in figures)
    return f'<div class="tiles">{shown}</div>'


def glossary(terms: Sequence[tuple[str, str]]) -> str:
    """Return a list of terms and their definitions as HTML.

    Args:
        terms: Each term with its definition, both as HTML.
    """
    return "<dl>" + "".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in terms) + "</dl>"


def figure(picture: str, caption: str) -> str:
    """Return a plot with its caption as HTML.

    Args:
        picture: Inline SVG.
        caption: Text as HTML.
    """
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def write_document(text: str, path: Path) -> None:
    """Write a page atomically.

    Args:
        text: The page as HTML.
        path: File to write. An existing file is replaced.

    Raises:
        TargetError: The file cannot be written.
    """
    Disk().replace_file(path, text.encode("utf-8"))


def _source_of(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
