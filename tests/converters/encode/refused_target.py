"""The message of a conversion whose target is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.errors import TargetError


def refusal(source: Path, out: Path, **arguments: object) -> str:
    """Return the message of a conversion that is refused before any byte is written, leaving no trace."""
    before = sorted(out.parent.rglob("*")) if out.parent.is_dir() else None
    with pytest.raises(TargetError) as refused:
        convert(source, out, **arguments)  # type: ignore[arg-type]
    assert before == (sorted(out.parent.rglob("*")) if out.parent.is_dir() else None)
    return str(refused.value)
