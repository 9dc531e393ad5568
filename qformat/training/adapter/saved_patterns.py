"""Finds the layers that the regular expressions in an adapter's config match, within limits of time and memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qformat import strict_json
from qformat.errors import AdapterError, ArtifactError
from qformat.printable import shortened
from qformat.training.adapter import pattern_matcher

_MAX_ANSWER_NBYTES = 2**26

_HANGS_S = 120
"""Time after which the matching process hangs, for example because it waits for a disk. Its own limit is far lower."""

_MAX_CHARACTERS = 80
"""Number of characters of a value that a message shows."""

_PLAIN = re.compile(r"[\w.\-]+")

Value = TypeVar("Value")


def is_plain_name(text: str) -> bool:
    """Return whether a text is the name of layers, and no pattern."""
    return _PLAIN.fullmatch(text) is not None


def value_shown(value: object) -> str:
    """Return a value from a file for a message."""
    return shortened(repr(value), _MAX_CHARACTERS)


def ends_of(name: str) -> list[str]:
    """Return the ends of a layer's name that begin at its start or after a dot."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def matching(pattern: str, names: Iterable[str], *, path: Path, field: str) -> list[str]:
    """Return the names that a pattern matches as a whole.

    Args:
        pattern: Regular expression.
        names: Names of layers.
        path: The adapter's config, for messages.
        field: Field of the config, for messages.

    Raises:
        AdapterError: The pattern is not valid or takes too long.
    """
    every = list(names)
    (found,) = _matches([pattern], every, path, field)
    return [every[number] for number in found]


def values_by_name(
    by_pattern: Mapping[str, Value], names: Iterable[str], *, path: Path, field: str
) -> dict[str, Value]:
    """Return the value of each name: that of the first pattern that matches the name, or its end after a dot.

    Args:
        by_pattern: Values by pattern.
        names: Names of layers.
        path: The adapter's config, for messages.
        field: Field of the config, for messages.

    Raises:
        AdapterError: A pattern is not valid or takes too long.
    """
    every, order = list(names), list(by_pattern)
    first: dict[str, int] = {}
    plain = {pattern: place for place, pattern in enumerate(order) if is_plain_name(pattern)}
    for name in every:
        if places := [plain[end] for end in ends_of(name) if end in plain]:
            first[name] = min(places)
    others = [(place, pattern) for place, pattern in enumerate(order) if pattern not in plain]
    found = _matches([rf"(?:.*\.)?(?:{pattern})$" for _, pattern in others], every, path, field)
    for (place, _), numbers in zip(others, found, strict=True):
        for number in numbers:
            first[every[number]] = min(place, first.get(every[number], place))
    return {name: by_pattern[order[first[name]]] for name in every if name in first}


def as_patterns(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return values by name in the form that PEFT reads, with one pattern for all names of a value."""
    names: dict[Value, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(re.escape(name))
    return {"|".join(same): value for value, same in names.items()}


def _matches(patterns: Sequence[str], names: Sequence[str], path: Path, field: str) -> list[list[int]]:
    """Return the numbers of the names that each pattern matches."""
    if not patterns:
        return []
    advice = "Give the names of the layers instead"
    command = [sys.executable, "-I", "-S", pattern_matcher.__file__]
    request = strict_json.dumps({"patterns": list(patterns), "names": list(names)}).encode()
    try:
        done = subprocess.run(command, input=request, capture_output=True, check=True, timeout=_HANGS_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise AdapterError(
            f"{path}: field {field!r}: matching {value_shown(patterns[0])} against the names of the layers takes too "
            f"long. {advice}"
        ) from None
    answer: Any = strict_json.loads(done.stdout, path=path, max_nbytes=_MAX_ANSWER_NBYTES, error=ArtifactError)
    if "problem" in answer:
        raise AdapterError(
            f"{path}: field {field!r}: is not a regular expression that Python can read: {answer['problem']}. {advice}"
        )
    found: list[list[int]] = answer["matches"]
    return found
