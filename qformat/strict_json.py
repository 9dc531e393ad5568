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

MIN_NBYTES_PER_VALUE = 16
"""A file of at most n bytes may hold n / 16 values: Python spends up to a hundred bytes on each, and a list of a
million empty lists is no file of ours. The densest real one, a header of 40,000 tensors, has a seventh of that."""

# Possessive: a greedy loop would remember each character of a string, a hundred bytes for every byte of the file.
_STRINGS = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]++")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

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
        _check_structure(text, max_nbytes // MIN_NBYTES_PER_VALUE)
        # The one place where the standard parser is called.
        value: Json = _DECODER.decode(text)
        if _SURROGATE_ESCAPE.search(text):
            dumps(value).encode("utf-8")  # half a surrogate pair is no character and cannot be written again
    except _Refused as refused:
        refuse(refused.reason, str(refused))
    except UnicodeDecodeError as broken:
        refuse(Reason.JSON_SYNTAX, f"not UTF-8 at byte {broken.start}")
    except UnicodeEncodeError as broken:
        half = ord(broken.object[broken.start])
        refuse(Reason.JSON_SYNTAX, f"a string with half a surrogate pair (\\u{half:04x})")
    except json.JSONDecodeError as broken:
        refuse(Reason.JSON_SYNTAX, f"not JSON at character {broken.pos}: {broken.msg}")
    return value


def dumps(value: object, *, indent: int | None = None) -> str:
    """Write JSON the one way qformat writes it: given key order, no NaN, non-ASCII as it is."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)


def _check_structure(text: str, max_values: int) -> None:
    """Refuse deep nesting and too many values before the recursive parser sees them; strings do not count."""
    n_open = text.count("[") + text.count("{")
    if n_open <= MAX_DEPTH and n_open + text.count(",") < max_values:
        return  # whatever of it lies in strings
    skeleton = _STRINGS.sub("", text)
    n_values = 1 + skeleton.count(",") + skeleton.count("[") + skeleton.count("{")
    if n_values > max_values:
        raise _Refused(Reason.JSON_LIMIT, f"{n_values} values, at most {max_values} are read")
    brackets = _NOT_BRACKETS.sub("", skeleton)
    if _is_shallow(brackets):
        return
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise _Refused(Reason.JSON_LIMIT, f"nested deeper than {MAX_DEPTH}")


def _is_shallow(brackets: str) -> bool:
    """Whether brackets are certainly nested no deeper than allowed; a header's thousands are looked at at once."""
    if len(brackets) <= MAX_DEPTH:
        return True
    for _ in range(MAX_DEPTH // 2):  # each replacement takes off one level where it finds any
        brackets = brackets.replace("[]", "").replace("{}", "")
        if not brackets:
            return True
    return False


def _refuse_constant(text: str) -> NoReturn:
    raise _Refused(Reason.JSON_SYNTAX, f"{text} is not JSON")


def _bounded_int(text: str) -> int | float:
    if len(text) > MAX_INTEGER_DIGITS:
        raise _Refused(Reason.JSON_LIMIT, f"an integer of {len(text)} digits, at most {MAX_INTEGER_DIGITS} are read")
    return -0.0 if text == "-0" else int(text)  # as other parsers have it: minus zero is no integer


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


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant,
    parse_int=_bounded_int,
    parse_float=_bounded_float,
    object_pairs_hook=_unique_keys,
)
"""Made once: an artifact has a JSON text for each packed tensor."""
