"""How the benchmarks turn times into figures; the times themselves are never asserted."""

from __future__ import annotations

import pytest

from tools.bench.generate import n_equal_first
from tools.bench.kernels import last_faster
from tools.bench.timing.interleaved import median_ratio, time_in_turn


def test_a_ratio_compares_the_times_of_one_round() -> None:
    assert median_ratio([1.0, 10.0, 3.0], [2.0, 20.0, 3.0]) == 0.5  # the second round was slow for both
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0], [1.0, 2.0])


def test_sides_take_turns() -> None:
    order: list[str] = []
    times = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, window_s=0)
    assert {side: len(taken) for side, taken in times.items()} == {"a": 3, "b": 3}
    assert order == ["a", "a", "b", "b"] * 4


@pytest.mark.parametrize(("ratios", "m"), [([0.5, 0.9, 1.1, 0.8], 2), ([1.0], 0), ([0.5, 0.6], 2), ([], 0)])
def test_the_threshold_is_the_last_m_before_one_that_is_slower(ratios: list[float], m: int) -> None:
    assert last_faster(ratios) == m


@pytest.mark.parametrize(("tokens", "n"), [([1, 2, 3], 3), ([1, 9, 3], 1), ([9, 2, 3], 0)])
def test_equal_tokens_are_counted_up_to_the_first_difference(tokens: list[int], n: int) -> None:
    assert n_equal_first(tokens, [1, 2, 3]) == n
