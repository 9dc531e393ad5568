"""Spells the options of the library as flags of the command line."""

from __future__ import annotations

import shlex

from qformat.errors import Option


def as_flag(option: Option) -> str:
    """Return an option as a flag: `--keep-source` for `keep_source=True`, `--no-x` for `x=False`."""
    flag = ("--no-" if option.value is False else "--") + option.name.replace("_", "-")
    if not isinstance(option.value, (str, tuple)):
        return flag
    values = (option.value,) if isinstance(option.value, str) else option.value
    return " ".join(f"{flag}={shlex.quote(value)}" for value in values)
