"""The message for a target that is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.converters.convert import convert
from qformat.errors import TargetError


def refusal(source: Path, out: Path, **arguments: object) -> str:
    """Return the message of a conversion that is rejected before any byte is written and leaves no trace."""
    before = sorted(out.parent.rglob("*")) if out.parent.is_dir() else None
    with pytest.raises(TargetError) as refused:
        convert(source, out, **arguments)  # type: ignore[arg-type]
    assert before == (sorted(out.parent.rglob("*")) if out.parent.is_dir() else None)
    return str(refused.value)
