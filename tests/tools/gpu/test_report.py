"""The report of a check of a GPU: verdict, JSON, table, comparison with an earlier run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.gpu.figures import BAD, DEVICE, FAST, GOOD
from tools.gpu.report import read_report, report, table
from tools.gpu.results import Result


def test_a_file_that_is_not_a_report_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=r"is not a report of tools\.gpu\.check with schema 1"):
        read_report(path)


@pytest.mark.parametrize(("results", "passed"), [([GOOD, FAST], True), ([GOOD, BAD, FAST], False), ([FAST], True)])
def test_one_failed_check_fails_the_run(results: list[Result], passed: bool) -> None:
    assert report(results, device=DEVICE)["passed"] is passed


def test_a_report_is_the_same_after_a_round_trip_through_json(tmp_path: Path) -> None:
    run = report([GOOD, BAD, FAST], device=DEVICE)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    assert read_report(path) == run


def test_the_table_shows_counts_failures_and_figures() -> None:
    lines = table(report([GOOD, BAD, FAST], device=DEVICE)).splitlines()
    assert lines[0] == "Test GPU (sm_90, 132 SMs)"
    assert "exact: 1 of 2 passed" in lines
    assert [line.split() for line in lines if "FAILED" in line] == [
        ["FAILED", "b", "wrong", "weights", "3.000"],
        ["SOME", "CHECKS", "FAILED"],
    ]
    assert any(line.split() == ["a", "bandwidth", "2000.000", "GB/s"] for line in lines)


def test_a_comparison_gives_the_ratio_to_the_earlier_figure() -> None:
    earlier = report([Result("speed", "a", "bandwidth", 1000.0, "GB/s")], device=DEVICE)
    text = table(report([FAST, Result("speed", "new", "bandwidth", 1.0, "GB/s")], device=DEVICE), earlier=earlier)
    assert "2.000 x earlier" in text
    assert text.count("x earlier") == 1
