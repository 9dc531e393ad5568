"""Parsing and formatting of sizes in bytes. Every option uses the same grammar, and the parser reads the formatter's
output.

A size is a number, optionally with a fraction, followed by an optional space and an optional unit. Case does not
matter.

    5GB  5 gb  5G     decimal units, as for disks and the Hub: kB, MB, GB, TB, PB, EB, or their first letter
    512MiB  1.5 GiB   binary units, as for the memory of devices: KiB, MiB, GiB, TiB, PiB, EiB
    7  7B             bytes
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from typing import Literal

from qformat.errors import Option, UsageError

_DECIMAL_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_NBYTES = {
    "": 1,
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)},
    **{unit[0].lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)},
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)},
}
"""Number of bytes by unit, in lower case."""

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")
_LIMIT = 2**63

Rounding = Literal["nearest", "up", "down"]
"""Direction in which a formatted size is rounded: up for a size that is needed, down for one that is available."""

_DECIMAL_ROUNDING: Mapping[Rounding, str] = {"nearest": ROUND_HALF_EVEN, "up": ROUND_CEILING, "down": ROUND_FLOOR}


def parse_nbytes(option: str | Option, text: str, *, or_else: str = "") -> int:
    """Return the number of bytes of a size such as `5GB`, `512MiB` or `7`, rounded down.

    Args:
        option: Option that the size was given for, for the error message.
        text: Size as the user wrote it.
        or_else: Beginning of the list of accepted values in the error message, such as `auto, or `.

    Raises:
        UsageError: The text is not a size, or the size is 2^63 bytes or more.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _NBYTES.get(match[2].lower()) if match is not None else None
    nbytes = int(Decimal(match[1]) * unit) if match is not None and unit is not None else _LIMIT
    if nbytes >= _LIMIT:
        raise UsageError(option, f" {text!r}: expected {or_else}a size such as 0, 512MiB or 5GB")
    return nbytes


def format_nbytes(nbytes: float, *, binary: bool = False, rounding: Rounding = "nearest") -> str:
    """Return a size with three significant digits and a unit, such as `116 MB`.

    Args:
        nbytes: Size in bytes, or a rate in bytes per second.
        binary: Use the binary units of device memory (KiB, MiB, GiB) instead of the decimal units of disks.
        rounding: Direction of the rounding.
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
