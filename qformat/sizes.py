"""Sizes in bytes, as people write and read them: one grammar for every option, and one formatter whose output it reads.

A size is a number, with a fraction if need be, and a unit, with a space between them if need be. Upper and lower case
mean the same.

    5GB  5 gb  5G     decimal units: kB, MB, GB, TB, PB, EB; the letter alone means the same, as disks and the Hub count
    512MiB  1.5 GiB   binary units: KiB, MiB, GiB, TiB, PiB, EiB, as devices count
    7  7B             bytes
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from typing import Literal

from qformat.errors import UsageError

_DECIMAL_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_NBYTES = {
    "": 1,
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)},
    **{unit[0].lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)},
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)},
}
"""Bytes of a unit in lower case."""

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")
_LIMIT = 2**63

Rounding = Literal["nearest", "up", "down"]
"""Which way a size is rounded when it is shown: what is needed goes up, what is there goes down."""

_DECIMAL_ROUNDING: Mapping[Rounding, str] = {"nearest": ROUND_HALF_EVEN, "up": ROUND_CEILING, "down": ROUND_FLOOR}


def parse_nbytes(option: str, text: str, *, or_else: str = "") -> int:
    """Return the bytes of a size such as `5GB`, `512MiB` or `7`, rounded down.

    option: what the size was given for, and or_else: what else may stand there; both are for the message.
    Raises UsageError.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _NBYTES.get(match[2].lower()) if match is not None else None
    nbytes = int(Decimal(match[1]) * unit) if match is not None and unit is not None else _LIMIT
    if nbytes >= _LIMIT:
        raise UsageError(f"{option} {text!r}: expected {or_else}bytes with or without a unit, such as 0, 512MiB or 5GB")
    return nbytes


def format_nbytes(nbytes: float, *, binary: bool = False, rounding: Rounding = "nearest") -> str:
    """Return a size, or a rate per second, for people: three digits and a unit, such as `116 MB`.

    binary: in KiB, MiB, GiB as devices count, instead of the decimal units of disks and the Hub.
    """
    step, units = (1024, _BINARY_UNITS) if binary else (1000, _DECIMAL_UNITS)
    digits = Context(prec=3, rounding=_DECIMAL_ROUNDING[rounding])
    exact = Decimal(nbytes)
    shown, unit = exact.to_integral_value(digits.rounding), units[0]
    for larger in units[1:]:
        if abs(shown) < 1000:
            break
        exact /= step
        shown, unit = digits.plus(exact), larger
    return f"{shown.normalize():f} {unit}"
