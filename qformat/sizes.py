"""Sizes in bytes, as people write them."""

from __future__ import annotations

from qformat.errors import UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "": 1}


def size_nbytes(name: str, text: str, *, or_else: str = "") -> int:
    """Return the bytes of "512MiB", "2GB" or "7". Raises UsageError naming the option."""
    number = text.rstrip("BGKMi")
    unit = text[len(number) :]
    try:
        nbytes = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        nbytes = -1.0
    if not 0 <= nbytes < 2**63:
        raise UsageError(f"{name} {text!r}: expected {or_else}bytes such as 0, 512MiB or 2GB")
    return int(nbytes)
