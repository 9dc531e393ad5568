"""The one JSON loader of the code base (spec section 8): bounded, no NaN, no duplicate keys, no deep nesting."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NoReturn

from qformat.errors import InvalidFileError, Reason

MAX_DEPTH = 32
MAX_INTEGER_DIGITS = 20
MAX_FLOAT_LITERAL = 64

_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
_BRACKETS = re.compile(r"[\[\]{}]")

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


class _Refused(Exception):
    def __init__(self, reason: Reason, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


def loads(
    data: bytes,
    *,
    path: Path | str,
    max_nbytes: int,
    error: type[InvalidFileError],
    tensor: str | None = None,
) -> Json:
    """Parse UTF-8 JSON bytes that come from a file.

    Raises: `error` with reason json_limit, json_duplicate_key or json_syntax, naming `path` (and `tensor`).
    """

    def refuse(reason: Reason, problem: str) -> NoReturn:
        raise error(reason, path, problem, tensor=tensor) from None

    if len(data) > max_nbytes:
        refuse(Reason.JSON_LIMIT, f"{len(data)} bytes of JSON, at most {max_nbytes} are read")
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        # The one place where the standard parser is called.
        value: Json = json.loads(  # noqa: TID251
            text,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_bounded_float,
            object_pairs_hook=_unique_keys,
        )
    except _Refused as refused:
        refuse(refused.reason, str(refused))
    except UnicodeDecodeError as broken:
        refuse(Reason.JSON_SYNTAX, f"not UTF-8 at byte {broken.start}")
    except json.JSONDecodeError as broken:
        refuse(Reason.JSON_SYNTAX, f"not JSON at byte {broken.pos}: {broken.msg}")
    return value


def dumps(value: object, *, indent: int | None = None) -> str:
    """Write JSON the one way qformat writes it: given key order, no NaN, non-ASCII as it is."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the recursive parser sees it; brackets inside strings do not count."""
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise _Refused(Reason.JSON_LIMIT, f"nested deeper than {MAX_DEPTH}")


def _refuse_constant(text: str) -> NoReturn:
    raise _Refused(Reason.JSON_SYNTAX, f"{text} is not JSON")


def _bounded_int(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise _Refused(Reason.JSON_LIMIT, f"an integer of {len(text)} digits, at most {MAX_INTEGER_DIGITS} are read")
    return int(text)


def _bounded_float(text: str) -> float:
    if len(text) > MAX_FLOAT_LITERAL:
        raise _Refused(Reason.JSON_LIMIT, f"a number of {len(text)} characters, at most {MAX_FLOAT_LITERAL} are read")
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(Reason.JSON_LIMIT, f"{text} does not fit a float64")
    return value


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(Reason.JSON_DUPLICATE_KEY, f"key {key!r} occurs twice")
            seen.add(key)
    return value
