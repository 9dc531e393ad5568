"""No damaged file passes in silence, ends in a traceback or a crash, hangs or costs much, under any command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.corpus.damage.table import CLASSES, copies
from tests.corpus.judge import Verdict
from tests.corpus.pool import one_thread_each, read_verdict
from tests.repository import ROOT


def verdicts(n: int, first: int = 0) -> list[Verdict]:
    """Judge `n` copies in a process of its own, because this one has threads, which a fork would lose."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.corpus.pool", str(n), "2", str(first)],
        cwd=ROOT, env=one_thread_each(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-5000:]
    return [read_verdict(json.loads(line)) for line in ran.stdout.splitlines()]


def check(n: int, first: int = 0) -> Counter[str]:
    """Judge copies and fail with every wrong verdict and the command that makes its copy again."""
    found = verdicts(n, first)
    assert {verdict.copy for verdict in found} == {*copies(first + n)[first:]}
    wrong = [verdict for verdict in found if verdict.wrong]
    assert not wrong, f"{len(wrong)} of {len(found)} runs:\n" + "\n".join(map(str, wrong[:40]))
    return Counter(verdict.verdict for verdict in found)


def test_five_hundred_damaged_copies_are_refused_clearly_or_do_no_harm() -> None:
    counted = check(500)
    # The damage is real, and not everything is refused for a reason that all copies share.
    assert counted["refused"] > 1000
    assert counted["same"] > 100
    assert counted["changed"] > 50


@pytest.mark.slow
def test_five_thousand_damaged_copies_are_refused_clearly_or_do_no_harm() -> None:
    check(5000, first=500)


def test_every_class_of_damage_is_in_the_short_run() -> None:
    assert len({kind.name for kind in CLASSES}) == len(CLASSES)
    assert {copy.kind for copy in copies(500)} == {kind.name for kind in CLASSES}
