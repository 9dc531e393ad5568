"""Rewrite the outputs that a page shows. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Sequence

from tools.docs.examples.running import Correction


def corrected(text: str, corrections: Sequence[Correction]) -> str:
    """Return a page with other outputs in place of some that it shows.

    Args:
        text: The page.
        corrections: New outputs, with the lines of the present ones; in any order.
    """
    lines = text.split("\n")
    # From the end, so that the numbers of earlier lines stay true.
    for correction in sorted(corrections, key=lambda one: one.line, reverse=True):
        first = correction.line - 1
        lines[first : first + correction.n_lines] = correction.output
    return "\n".join(lines)
