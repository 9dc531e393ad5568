"""Tasks on threads: results are in order, the first error is raised, and no task starts after it."""

from __future__ import annotations

import threading

import pytest

from qformat.cores import run_tasks, usable_cores

LONG_S = 60.0


def test_at_least_one_core_is_usable() -> None:
    assert usable_cores() >= 1


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_have_the_keys_and_the_order_of_the_tasks(workers: int) -> None:
    tasks = {number: number for number in range(20)}
    found = run_tasks(tasks, lambda number: number * number, workers=workers, thread_name="test")
    assert list(found.items()) == [(number, number * number) for number in range(20)]


def test_no_tasks_give_no_results() -> None:
    assert run_tasks({}, lambda task: task, workers=2, thread_name="test") == {}


def test_an_error_stops_running_and_waiting_tasks() -> None:
    stopping, second_runs = threading.Event(), threading.Event()
    begun: list[str] = []
    woken: list[bool] = []

    def do(name: str) -> None:
        begun.append(name)
        if name == "fails":
            assert second_runs.wait(LONG_S)
            raise ValueError(name)
        second_runs.set()
        assert stopping.wait(LONG_S)

    names = ("fails", "waits", "never begun", "never begun either")
    with pytest.raises(ValueError, match="fails"):
        run_tasks(
            {name: name for name in names},
            do,
            workers=2,
            thread_name="test",
            stopping=stopping,
            on_stop=lambda: woken.append(True),
        )
    assert set(begun[:2]) == {"fails", "waits"}
    assert woken == [True]
    assert "never begun either" not in begun
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test")]
