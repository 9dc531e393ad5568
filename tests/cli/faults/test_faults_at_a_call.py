"""A fault of the disk at any call: nothing incomplete under the final name, a clear message, the same bytes later."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.cli.faults.injection import Interceptor, PowerCutInterceptor
from tests.cli.faults.rehearsed import Rehearsed
from tests.cli.faults.running import Outcome
from tests.cli.faults.table import FORMS, Fault

AT_A_CALL: dict[Fault, Callable[[int], Interceptor]] = {
    Fault.KILL: lambda k: Interceptor(k, "kill"),
    Fault.FULL: lambda k: Interceptor(k, "full from here on"),
    Fault.BROKEN: lambda k: Interceptor(k, "EIO"),
    Fault.POWER_CUT: PowerCutInterceptor,
    Fault.SHORT_WRITE: lambda k: Interceptor(k, "short write"),
    Fault.NO_WRITE: lambda k: Interceptor(k, "nothing written from here on"),
}
"""Disks with a fault at the k-th call."""

OF_WRITES = {Fault.SHORT_WRITE, Fault.NO_WRITE}
"""Faults that only a write can have."""

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.mark.parametrize("rehearsed", FORMS, indirect=True)
def test_after_a_fault_the_output_is_absent_or_whole_and_the_same_command_completes_it(rehearsed: Rehearsed) -> None:
    for fault, k in some_places(rehearsed.calls, rehearsed.form.n_fast):
        check(rehearsed, fault, k)


@pytest.mark.slow
@pytest.mark.parametrize("rehearsed", FORMS, indirect=True)
def test_the_same_holds_for_a_fault_at_every_call(rehearsed: Rehearsed) -> None:
    turns = itertools.cycle(AT_A_CALL)
    for k, name in enumerate(rehearsed.calls):
        for fault in [next(turns)] if rehearsed.form.takes_seconds else AT_A_CALL:
            if fault not in OF_WRITES or "write" in name:
                check(rehearsed, fault, k)


def some_places(calls: list[str], n: int) -> Iterator[tuple[Fault, int]]:
    """Yield the first, the last and a middle call of each kind, at most `n` of them, with the faults in turn."""
    of_kind: dict[str, list[int]] = {}
    for k, name in enumerate(calls):
        of_kind.setdefault(name, []).append(k)
    middle = [numbers[len(numbers) // 2] for numbers in of_kind.values()]
    chosen = list(dict.fromkeys([len(calls) // 2, len(calls) - 1, 0, *middle]))
    faults = itertools.cycle(AT_A_CALL)
    for k in chosen[:n]:
        fault = next(faults)
        while fault in OF_WRITES and "write" not in calls[k]:
            fault = next(faults)
        yield fault, k


def check(rehearsed: Rehearsed, fault: Fault, k: int) -> None:
    """Run with a fault at the k-th call, check what is left, and run again."""
    where = f"{fault} at call {k} of {len(rehearsed.calls)}, {rehearsed.calls[k]}"
    case = rehearsed.case()
    disk = AT_A_CALL[fault](k)
    outcome = case.run(disk)
    standing = case.made()
    assert standing in (rehearsed.before, rehearsed.whole), where
    if fault in (Fault.KILL, Fault.POWER_CUT):
        assert outcome.code is None or disk.n_calls <= k, where  # with several threads the number of calls varies
    elif fault is Fault.SHORT_WRITE:
        assert outcome.code == 0, f"{where}: {outcome.told}"
    elif outcome.code:  # otherwise it came too late to matter
        check_told(outcome, where)
    again = case.run()
    if again.code:  # the fault came after the last step: the second run finds the complete output
        assert standing == rehearsed.whole, f"{where}: {again.told}"
        assert "exists" in again.error, where
    assert case.made() == rehearsed.whole, where
    assert case.everything().keys() == rehearsed.everything.keys(), where


def check_told(outcome: Outcome, where: str) -> None:
    """Check that a failure is told in one line with the path and the next step."""
    assert outcome.code == 1, where
    assert "Traceback" not in outcome.told, where
    assert "cannot be written: " in outcome.error or ": not enough disk space: " in outcome.error, outcome.error
    assert "run the same command again" in outcome.error, f"{where}: {outcome.error}"
