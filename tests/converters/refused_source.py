"""The error for a source that is rejected by both plan and conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.errors import SourceError


def refusal(source: Path, options: ConversionOptions | None = None) -> SourceError:
    """Return the error of a conversion, after checking that plan raises the same and that no output exists."""
    out = source.with_name("out")
    with pytest.raises(SourceError) as refused:
        convert(source, out, options)
    assert not out.exists()
    with pytest.raises(SourceError) as planned:
        plan(source, options)
    assert str(planned.value) == str(refused.value)
    assert not out.with_name("out.partial").exists()
    return refused.value
