"""Compare an output with the one that a page shows. Pure: no files, no processes.

A line `...` stands for any lines or none, `...` inside a line for any text. Figures that depend on the machine are
masked on both sides. In an output with such figures, a run of spaces counts as one space: the length of a figure moves
the columns of its table.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

NUMBER = r"(?:\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\.\.)"
SIZE = rf"{NUMBER} ?(?:bytes|[kKMGT]?i?B)"
MASKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(rf"{NUMBER} ?(?:[kMG] )?(?:[A-Za-z]+ )?[A-Za-z]+/(?:s|second|step|token)\b"), "<rate>"),
    (re.compile(rf"{NUMBER} (?:[A-Za-z]+ ){{1,3}}(?:per|a) second\b"), "<rate>"),
    (re.compile(r"\b\d+:\d\d(?::\d\d)?\b(?! *[AP]M)"), "<time>"),
    (re.compile(rf"(?<![\w.]){NUMBER} ?(?:ns|us|µs|ms|s|sec|seconds?|min|minutes?|h|hours?)\b(?!/)"), "<time>"),
    (re.compile(rf"(<rate> {{2,}}){SIZE}"), r"\1<size>"),  # peak memory in the lines of a training
    (re.compile(rf"\b(peak(?: \w+)?:? ){SIZE}"), r"\1<size>"),
    (re.compile(rf"{SIZE} ((?:(?:is|are|of) )?(?:peak|free|available)\b)"), r"<size> \1"),
    (re.compile(rf"\b(free(?: space)?:? ){SIZE}"), r"\1<size>"),
    (re.compile(r"\b[0-9a-f]{40}\b"), "<commit>"),
    (re.compile(r"((?:commit|revision|tree/|resolve/|@) ?)[0-9a-f]{7,40}\b"), r"\1<commit>"),
)
"""What depends on the machine in any output, and what stands in its place while outputs are compared."""

VERSION = re.compile(r"\b\d+\.\d+(?:\.\w+)*(?:\+\w+)?")
ANY_NUMBER = re.compile(r"[-+]?\b\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?")
ELISION = "..."


def masked(lines: Sequence[str], *, versions: bool = False, figures: bool = False) -> list[str]:
    """Replace what depends on the machine in the lines of an output.

    Args:
        lines: Lines of an output.
        versions: Whether to mask version numbers, too.
        figures: Whether to mask every number.
    """
    text = "\n".join(lines)
    n_masked = 0
    for pattern, instead in MASKS:
        text, n = pattern.subn(instead, text)
        n_masked += n
    if versions:
        text, n = VERSION.subn("<version>", text)
        n_masked += n
    if figures:
        text, n = ANY_NUMBER.subn("<n>", text)
        text = re.sub(r"([-─=])\1{2,}", r"\1\1\1", text)
        n_masked += n
    if n_masked:
        text = re.sub(r"(?<=\S) {2,}", " ", text)
        text = re.sub(r"(?m)^ {2,}", " ", text)
    return text.split("\n") if lines else []


def line_pattern(line: str) -> re.Pattern[str]:
    """Return the pattern of the lines that a masked line of a page stands for."""
    return re.compile(".*".join(re.escape(part) for part in line.split(ELISION)))


def matches(expected: Sequence[str], actual: Sequence[str]) -> bool:
    """Return whether masked lines are those that a page shows, elisions considered."""
    # reachable: the numbers of actual lines that the expected lines so far can stand for.
    reachable = {0}
    for line in expected:
        if line.strip() == ELISION:
            reachable = set(range(min(reachable), len(actual) + 1))
            continue
        pattern = line_pattern(line)
        reachable = {at + 1 for at in reachable if at < len(actual) and pattern.fullmatch(actual[at])}
        if not reachable:
            return False
    return len(actual) in reachable


def has_elision(lines: Sequence[str]) -> bool:
    """Return whether the shown output leaves something out."""
    return any(ELISION in line for line in lines)


def difference(expected: Sequence[str], actual: Sequence[str], *, versions: bool, figures: bool) -> str | None:
    """Return a unified diff from the shown output to the real one, or None if they agree.

    Args:
        expected: Lines that the page shows.
        actual: Lines that the command printed.
        versions: Whether version numbers may differ.
        figures: Whether every number may differ.
    """
    masked_expected = masked(expected, versions=versions, figures=figures)
    masked_actual = masked(actual, versions=versions, figures=figures)
    if matches(masked_expected, masked_actual):
        return None
    patterns = [(line_pattern(line), shown) for line, shown in zip(masked_expected, expected, strict=True)]
    # A line that agrees but for its masks must not appear as a change.
    as_shown = [
        next((text for pattern, text in patterns if text.strip() != ELISION and pattern.fullmatch(line)), real)
        for line, real in zip(masked_actual, actual, strict=True)
    ]
    return "\n".join(difflib.unified_diff(expected, as_shown, "shown on the page", "printed now", lineterm=""))
