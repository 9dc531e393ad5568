"""The search for the largest size that fits."""

from __future__ import annotations

import pytest

from qformat.training.memory_plan.search import largest


@pytest.mark.parametrize("most", [1, 2, 7, 1000])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 6, 7, 8, 500, 5000])
@pytest.mark.parametrize("power", [0.5, 1, 2])
@pytest.mark.parametrize("start", [1, 2, 300])
def test_the_search_finds_the_largest_size_that_fits(most: int, limit: int, power: float, start: int) -> None:
    asked = []

    def room(n: int) -> int:
        asked.append(n)
        return int(1000 * ((limit + 0.5) ** power - n**power))

    assert largest(room, most, start=start) == min(limit, most)
    assert len(asked) < 30
