"""A budget ends a task after too many attempts, too much time or too many bytes. Only kept bytes are progress."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qformat.errors import HubError
from qformat.hub.reading.budget import Budget, Unusable
from qformat.hub.reading.transfer import Patience
from tests.hub.artificial_time import ArtificialTime

LIMITS = Patience(attempts=3, first_wait_s=1.0, window_s=30.0, progress_nbytes=1000, task_s=100.0)


@pytest.fixture
def time() -> ArtificialTime:
    return ArtificialTime()


def budget(time: ArtificialTime, *, nbytes: int = 0, max_discarded_nbytes: int = 0) -> Budget:
    limits = replace(LIMITS, clock=time.clock)
    return Budget("me/model", "a file", limits, nbytes=nbytes, max_discarded_nbytes=max_discarded_nbytes)


def test_attempts_without_progress_are_counted_and_the_pauses_grow(time: ArtificialTime) -> None:
    task = budget(time)
    task.failed("no answer")
    task.failed("no answer")
    with pytest.raises(HubError, match=r"me/model: a file: no answer, 3 times in a row"):
        task.failed("no answer")
    assert time.waits == [1.0, 3.0]


def test_kept_bytes_reset_the_count_once_there_are_enough_of_them(time: ArtificialTime) -> None:
    task = budget(time, nbytes=10_000)
    for _ in range(5):  # 600 bytes each: the count is reset after every second attempt
        task.begin_answer()
        task.keep(600)
        task.failed("broken")
    task.keep(1)
    with pytest.raises(HubError, match="3 times in a row"):
        task.failed("broken")


def test_thrown_away_bytes_are_no_progress_and_have_a_limit(time: ArtificialTime) -> None:
    task = budget(time, nbytes=10_000, max_discarded_nbytes=5000)
    task.discard(4000)
    task.failed("broken")
    task.failed("broken")
    with pytest.raises(HubError, match="3 times in a row"):
        task.failed("broken")
    with pytest.raises(HubError, match="5001 bytes that nobody asked for"):
        task.discard(1001)


def test_a_slow_connection_works_as_long_as_every_window_keeps_enough(time: ArtificialTime) -> None:
    task = budget(time, nbytes=1_000_000)
    task.begin_answer()
    for _ in range(1000):  # 1000 bytes in 29 s: eight hours in all
        time.pass_by(14.5)
        task.keep(500)
        time.pass_by(14.5)
        task.keep(500)
    time.pass_by(30.5)
    with pytest.raises(Unusable, match="bytes arrived in 30 s") as caught:
        task.keep(999)
    assert caught.value.slow


def test_a_task_ends_even_if_every_attempt_makes_a_little_progress(time: ArtificialTime) -> None:
    task = budget(time, nbytes=2000)  # 100 s, and 30 s for each 1000 bytes
    for _ in range(16):
        time.pass_by(9.0)
        task.keep(1000)
        task.failed("broken")
    time.pass_by(9.0)
    with pytest.raises(HubError, match="given up after 169 s"):
        task.keep(1000)


def test_a_small_answer_has_a_limit_of_time_and_size(time: ArtificialTime) -> None:
    task = budget(time)
    task.begin_answer()
    time.pass_by(29.0)
    task.take_small(1, max_nbytes=5000)
    time.pass_by(29.0)
    task.take_small(1000, max_nbytes=5000)
    with pytest.raises(Unusable, match="only 2 bytes arrived in 58 s"):
        task.take_small(2, max_nbytes=5000)
    with pytest.raises(HubError, match="more than 5000 bytes"):
        task.take_small(5001, max_nbytes=5000)


def test_a_pause_beyond_the_time_of_the_task_is_not_begun(time: ArtificialTime) -> None:
    task = budget(time)
    task.failed("busy", wait_s=60.0)
    with pytest.raises(HubError, match="given up after 60 s: busy"):
        task.failed("busy", wait_s=60.0)
