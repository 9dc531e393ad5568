"""The strict JSON parser and writer that all of qformat uses (spec section 8).

The parser limits the size, the nesting and the numbers of a text, and rejects NaN and duplicate keys. `config.json` may
have the numbers of Python's json module, with which transformers writes it. In a file of a source, whatever this module
reads is accepted and remarked on.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NoReturn

from qformat.errors import InvalidFileError, Reason

MAX_DEPTH = 32
MAX_INTEGER_DIGITS = 20
MAX_PYTHON_INTEGER_DIGITS = 4300
"""Longest integer that Python's json module reads, in characters."""

MAX_FLOAT_LITERAL = 64

MIN_NBYTES_PER_VALUE = 16
"""A text with a limit of n bytes may contain at most n / 16 values, because Python needs up to 100 bytes of memory for
each value. The densest real file, a header of 40,000 tensors, has a seventh of that limit."""

MAX_VALUES = 1_310_720
"""Largest number of values of any text: 300 MB of memory and two seconds. The manifest of a model of 80,000 packed
tensors has that many."""

# Possessive quantifiers save memory: a greedy loop would need about 100 bytes for every character of a string.
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
    python_numbers: bool = False,
    remarks: list[str] | None = None,
) -> Json:
    """Parse a JSON text from a file.

    Args:
        data: Text in UTF-8.
        path: File of the text, for error messages.
        max_nbytes: Largest size of such a text, in bytes.
        error: Class of the error to raise.
        tensor: Tensor that the text describes, for error messages.
        python_numbers: Whether NaN, Infinity and integers of up to 4,300 characters are accepted.
        remarks: If given, a byte order mark, keys that occur twice and the numbers of `python_numbers` are accepted,
            and a remark about each is appended. Of two values of a key the last one counts, as in Python's json module.

    Raises:
        InvalidFileError: The text is invalid or exceeds a limit. The class of the error is `error`; the reason is
            json_limit, json_duplicate_key or json_syntax.
    """

    def refuse(reason: Reason, problem: str) -> NoReturn:
        raise error(reason, path, problem, tensor=tensor) from None

    if len(data) > max_nbytes:
        refuse(Reason.JSON_LIMIT, f"the JSON text has {len(data)} bytes (the limit is {max_nbytes})")
    try:
        if remarks is not None and data.startswith(codecs.BOM_UTF8):
            data = data.removeprefix(codecs.BOM_UTF8)
            remarks.append("begins with a byte order mark, which transformers rejects")
        text = data.decode("utf-8")
        _check_structure(text, min(max_nbytes // MIN_NBYTES_PER_VALUE, MAX_VALUES))
        # All JSON texts are parsed by this call, so that none bypasses the checks.
        value: Json = _decoder(python_numbers, remarks).decode(text)
        if _SURROGATE_ESCAPE.search(text):
            dumps(value, python_numbers=True).encode(
                "utf-8"
            )  # fails on half a surrogate pair, which UTF-8 cannot represent
    except _Refused as refused:
        refuse(refused.reason, str(refused))
    except UnicodeDecodeError as broken:
        refuse(Reason.JSON_SYNTAX, f"is not valid UTF-8 at byte {broken.start}")
    except UnicodeEncodeError as broken:
        half = ord(broken.object[broken.start])
        refuse(Reason.JSON_SYNTAX, f"a string contains half a surrogate pair (\\u{half:04x})")
    except json.JSONDecodeError as broken:
        refuse(Reason.JSON_SYNTAX, f"is not valid JSON at character {broken.pos}: {broken.msg}")
    return value


def dumps(value: object, *, indent: int | None = None, python_numbers: bool = False) -> str:
    """Return a value as JSON text: keys in the given order, non-ASCII characters unescaped.

    Args:
        value: Value to write.
        indent: Number of spaces per level; None for compact text on one line.
        python_numbers: Whether NaN and Infinity may occur.
    """
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, indent=indent, separators=separators, ensure_ascii=False, allow_nan=python_numbers)


def _check_structure(text: str, max_values: int) -> None:
    """Reject deep nesting and too many values outside strings, before the recursive parser runs."""
    n_open = text.count("[") + text.count("{")
    if n_open <= MAX_DEPTH and n_open + text.count(",") < max_values:
        return  # within the limits even if no bracket or comma is part of a string
    skeleton = _STRINGS.sub("", text)
    n_values = 1 + skeleton.count(",") + skeleton.count("[") + skeleton.count("{")
    if n_values > max_values:
        raise _Refused(Reason.JSON_LIMIT, f"the JSON text has {n_values} values (the limit is {max_values})")
    brackets = _NOT_BRACKETS.sub("", skeleton)
    if _is_shallow(brackets):
        return
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise _Refused(Reason.JSON_LIMIT, f"the JSON text is nested deeper than {MAX_DEPTH} levels")


def _is_shallow(brackets: str) -> bool:
    """Return True only if the nesting is within the limit; fast for the thousands of brackets of a header."""
    if len(brackets) <= MAX_DEPTH:
        return True
    for _ in range(MAX_DEPTH // 2):  # each replacement removes the innermost level
        brackets = brackets.replace("[]", "").replace("{}", "")
        if not brackets:
            return True
    return False


def _refuse_constant(text: str) -> NoReturn:
    raise _Refused(Reason.JSON_SYNTAX, f"{text} is not valid JSON")


def _bounded_int(text: str) -> int | float:
    if len(text) > MAX_INTEGER_DIGITS:
        raise _Refused(Reason.JSON_LIMIT, f"an integer has {len(text)} digits (the limit is {MAX_INTEGER_DIGITS})")
    return -0.0 if text == "-0" else int(text)  # minus zero is a float, as in other parsers


def _bounded_float(text: str) -> float:
    if len(text) > MAX_FLOAT_LITERAL:
        raise _Refused(Reason.JSON_LIMIT, f"a number has {len(text)} characters (the limit is {MAX_FLOAT_LITERAL})")
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(Reason.JSON_LIMIT, f"{text} is outside the range of float64")
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


def _python_int(text: str) -> int | float:
    if len(text) > MAX_PYTHON_INTEGER_DIGITS:
        problem = f"an integer has {len(text)} digits (the limit is {MAX_PYTHON_INTEGER_DIGITS})"
        raise _Refused(Reason.JSON_LIMIT, problem)
    return -0.0 if text == "-0" else int(text)


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant,
    parse_int=_bounded_int,
    parse_float=_bounded_float,
    object_pairs_hook=_unique_keys,
)
"""Shared decoder, because an artifact has one JSON text for each packed tensor."""

_DECODER_OF_PYTHON_NUMBERS = json.JSONDecoder(
    parse_int=_python_int, parse_float=_bounded_float, object_pairs_hook=_unique_keys
)


def _decoder(python_numbers: bool, remarks: list[str] | None) -> json.JSONDecoder:
    if remarks is None:
        return _DECODER_OF_PYTHON_NUMBERS if python_numbers else _DECODER

    def remark(text: str) -> None:
        if text not in remarks:
            remarks.append(text)

    def constant(text: str) -> float:
        remark(f"contains {text}, which is not JSON: readers other than Python's reject it")
        return float(text)

    def integer(text: str) -> int | float:
        if len(text) > MAX_INTEGER_DIGITS:
            remark(f"contains an integer of {len(text)} digits, which many readers reject")
        return _python_int(text)

    def pairs(found: list[tuple[str, Json]]) -> dict[str, Json]:
        value = dict(found)
        if len(value) != len(found):
            for key, times in Counter(key for key, _ in found).items():
                if times > 1:
                    remark(f"contains the key {key!r} {times} times; the last value counts, as in transformers")
        return value

    return json.JSONDecoder(
        parse_constant=constant, parse_int=integer, parse_float=_bounded_float, object_pairs_hook=pairs
    )
