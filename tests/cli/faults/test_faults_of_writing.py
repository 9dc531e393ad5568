"""A fault of the disk at any call: nothing incomplete under the final name, a clear message, and the same bytes later."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.faults.injection import Interceptor, PowerCutInterceptor
from tests.cli.faults.running import Case, Outcome
from tests.cli.faults.table import FORMS, Fault, Form
from tests.hub_stand_in import Hub

AT_A_CALL: dict[Fault, Callable[[int], Interceptor]] = {
    Fault.KILL: lambda k: Interceptor(k, "kill"),
    Fault.FULL: lambda k: Interceptor(k, "full from here on"),
    Fault.BROKEN: lambda k: Interceptor(k, "EIO"),
    Fault.POWER_CUT: PowerCutInterceptor,
    Fault.SHORT_WRITE: lambda k: Interceptor(k, "short write"),
}
"""Disks with a fault at the k-th call."""


class Rehearsed:
    """A form, the calls that it makes to the disk, and what it makes when nothing disturbs it."""

    def __init__(self, form: Form, given: Path, folder: Path) -> None:
        self.form = form
        self._given = given
        self._folder = folder
        self._numbers = itertools.count()
        case = self.case()
        self.before = case.made()
        disk = Interceptor()
        done = case.run(disk)
        assert done.code == 0, done.told
        self.calls = disk.names
        self.whole = case.made()
        self.everything = case.everything()
        assert self.calls
        assert self.whole not in (None, self.before)

    def case(self) -> Case:
        """Return a new folder for a run."""
        return Case(self.form, self._given, self._folder / str(next(self._numbers)))

    def check(self, fault: Fault, k: int) -> None:
        """Run with a fault at the k-th call, check what is left, and run again."""
        where = f"{fault} at call {k} of {len(self.calls)}, {self.calls[k]}"
        case = self.case()
        disk = AT_A_CALL[fault](k)
        outcome = case.run(disk)
        standing = case.made()
        assert standing in (self.before, self.whole), where
        if fault in (Fault.KILL, Fault.POWER_CUT):
            assert outcome.code is None or disk.n_calls <= k, where  # with several threads the number of calls varies
        elif fault is Fault.SHORT_WRITE:
            assert outcome == Outcome(0, outcome.told), where
        else:
            check_told(outcome, case.folder, where)
        again = case.run()
        if again.code:  # the fault came after the last step: the second run finds the complete output
            assert standing == self.whole, f"{where}: {again.told}"
            assert "exists" in again.told, where
        assert case.made() == self.whole, where
        assert case.everything().keys() == self.everything.keys(), where


def check_told(outcome: Outcome, folder: Path, where: str) -> None:
    """Check that a failure is one line that names a file and the next step. Some failures come too late to matter."""
    if outcome.code == 0:
        return
    assert outcome.code == 1, where
    assert "Traceback" not in outcome.told, where
    (line,) = [line for line in outcome.told.splitlines() if line.startswith("Error: ")]
    assert "out" in line or str(folder) in line, f"{where}: {line}"
    assert any(step in line for step in ("same command again", "--resume", "another directory")), f"{where}: {line}"


def places(calls: list[str], n: int) -> Iterator[tuple[Fault, int]]:
    """Yield the first, the last and a middle call of each kind, at most `n` of them, each with the next fault in turn."""
    of_kind: dict[str, list[int]] = {}
    for k, name in enumerate(calls):
        of_kind.setdefault(name, []).append(k)
    middle = [numbers[len(numbers) // 2] for numbers in of_kind.values()]
    chosen = list(dict.fromkeys([0, len(calls) - 1, *middle]))
    faults = itertools.cycle(AT_A_CALL)
    for k in chosen[:n]:
        fault = next(faults)
        if fault is Fault.SHORT_WRITE and "write" not in calls[k]:
            fault = next(faults)
        yield fault, k


@pytest.fixture
def rehearsed(request: pytest.FixtureRequest, hub: Hub, given: Path, tmp_path: Path) -> Rehearsed:
    return Rehearsed(FORMS[request.param], given, tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("rehearsed", FORMS, indirect=True)
def test_after_a_fault_the_output_is_absent_or_whole_and_the_same_command_completes_it(rehearsed: Rehearsed) -> None:
    for fault, k in places(rehearsed.calls, rehearsed.form.n_fast):
        rehearsed.check(fault, k)
