"""Searches for the largest size that fits, with few evaluations, because each evaluation runs a model."""

from __future__ import annotations

from collections.abc import Callable


def largest(room: Callable[[int], int], most: int, *, start: int = 2) -> int:
    """Return the largest n for which room(n) is not negative. Uses secant steps and bisection.

    Args:
        room: Bytes left free at a size, a decreasing function. Negative if the size does not fit.
        most: Largest size to consider.
        start: Size to try after 1.

    Returns:
        The largest n from 1 to `most` that fits, or 0 if none does.
    """
    if (at_low := room(1)) < 0:
        return 0
    low, high, at_high, reach = 1, most + 1, 0, start - 2  # at_high stays 0 until a size does not fit
    for turn in range(2 * most.bit_length() + 8):
        if high - low <= 1:
            break
        if at_high == 0:
            guess = low + max(1, reach)
        elif turn % 3 == 2:
            guess = (low + high) // 2
        else:
            guess = low + (high - low) * at_low // (at_low - at_high)
        guess = min(max(guess, low + 1), high - 1)
        found = room(guess)
        if found < 0:
            high, at_high = guess, found
            continue
        reach = found * (guess - low) // max(1, at_low - found)
        low, at_low = guess, found
        if at_high and low + 1 < high:  # a secant step often finds the answer: check whether the next size fails
            found = room(low + 1)
            if found < 0:
                return low
            low, at_low = low + 1, found
    return low
