"""What all pages share: one self-contained HTML document that fetches nothing and forbids all that is not its own.

Everything that comes from a file passes through `html.escape`; a content security policy with the digests of the one
style sheet and the one script forbids all others.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from qformat.artifact.writing.disk import Disk
from qformat.report.appearance import SORT_SCRIPT, STYLE


def document(title: str, sections: Sequence[str]) -> str:
    """Return a page. title: escaped already. sections: HTML; empty ones are left out."""
    policy = f"default-src 'none'; style-src {_source_of(STYLE)}; script-src {_source_of(SORT_SCRIPT)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<script>{SORT_SCRIPT}</script>\n</body>\n</html>\n"
    )


def write_document(text: str, path: Path) -> None:
    """Write a page, in one step once it is complete. Raises TargetError if the file cannot be written."""
    Disk().replace_file(path, text.encode("utf-8"))


def _source_of(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
