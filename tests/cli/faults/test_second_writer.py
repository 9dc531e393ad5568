"""Two processes run the same command at the same time: one complete output, and a clear message for who is refused."""

from __future__ import annotations

import pytest

from tests.cli.faults.injection import Meanwhile
from tests.cli.faults.rehearsed import Rehearsed
from tests.cli.faults.running import Outcome
from tests.cli.faults.table import FORMS

REFUSALS = ("another process", "another training", "already exists", "already contains a training")


@pytest.mark.parametrize("rehearsed", FORMS, indirect=True)
def test_a_second_run_at_any_time_disturbs_nothing(rehearsed: Rehearsed) -> None:
    """The second run starts and ends inside of a call of the first one to the disk."""
    n_calls = len(rehearsed.calls)
    for k in [n_calls // 2, n_calls - 1, 0][: rehearsed.form.n_fast]:
        check(rehearsed, k)


@pytest.mark.slow
@pytest.mark.parametrize("rehearsed", FORMS, indirect=True)
def test_a_second_run_at_every_call_disturbs_nothing(rehearsed: Rehearsed) -> None:
    for k in range(0, len(rehearsed.calls), 7 if rehearsed.form.takes_seconds else 1):
        check(rehearsed, k)


def check(rehearsed: Rehearsed, k: int) -> None:
    case = rehearsed.case()
    outcomes: list[Outcome] = []
    outcomes.append(case.run(Meanwhile(k, lambda: outcomes.append(case.run()))))
    assert 0 in [outcome.code for outcome in outcomes], outcomes
    for outcome in outcomes:
        if outcome.code:
            assert outcome.code == 1
            assert any(refusal in outcome.error for refusal in REFUSALS), f"call {k}: {outcome.told}"
    assert case.made() == rehearsed.whole, f"call {k}: {outcomes}"
    assert case.everything().keys() == rehearsed.everything.keys(), f"call {k}"
