"""The largest size that fits, in few looks: each look runs a model."""

from __future__ import annotations

from collections.abc import Callable


def largest(room: Callable[[int], int], most: int, *, start: int = 2) -> int:
    """Return the largest n up to `most` for which room(n), which falls, is not negative: by secants, then bisection."""
    if (at_low := room(1)) < 0:
        return 0
    low, high, at_high, reach = 1, most + 1, 0, start - 2  # at_high: 0 as long as nothing was found that does not fit
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
        if at_high and low + 1 < high:  # a secant is often right
            found = room(low + 1)
            if found < 0:
                return low
            low, at_low = low + 1, found
    return low
