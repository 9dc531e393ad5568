"""tools/gpu/check.py as far as a machine without a GPU can test it: arguments, verdicts, report, comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qformat.kernels.triton.product import LaunchPlan
from tests.kernels.triton.interpreter import run_interpreted
from tools.gpu import check as gpu_check
from tools.gpu.check import Result, Settings

DEVICE = {"name": "Test GPU", "compute_capability": "9.0", "multiprocessors": 132, "memory_nbytes": 1}
CPU = Settings(torch.device("cpu"))
GOOD = Result("exact", "a", "wrong weights", 0, "", True)
BAD = Result("exact", "b", "wrong weights", 3, "", False)
FAST = Result("speed", "a", "bandwidth", 2000.0, "GB/s")


def test_the_exactness_checks_run_under_the_interpreter() -> None:
    run_interpreted(Path(__file__).parent / "interpreted" / "check.py")


def test_without_a_gpu_it_says_so_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--compare", "missing.json"], ["--unknown"]])
def test_arguments_that_make_no_sense_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="not a report of this tool"):
        gpu_check.read_report(path)


def test_the_checks_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu_check.CHECKS)
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize(("results", "passed"), [([GOOD, FAST], True), ([GOOD, BAD, FAST], False), ([FAST], True)])
def test_one_failed_check_fails_the_run(results: list[Result], passed: bool) -> None:
    assert gpu_check.report(results, device=DEVICE)["passed"] is passed


def test_a_check_that_raises_fails_and_the_others_go_on() -> None:
    def broken(_: Settings) -> Iterator[Result]:
        yield GOOD
        raise RuntimeError("CUDA error: an illegal memory access")

    checks = {"broken": broken, "good": lambda _: iter([FAST])}
    results = gpu_check.run_checks(["broken", "good"], CPU, checks=checks)
    assert [(result.check, result.passed) for result in results] == [("broken", False), ("speed", None)]
    assert "illegal memory access" in results[0].case


def test_a_report_survives_json(tmp_path: Path) -> None:
    run = gpu_check.report([GOOD, BAD, FAST], device=DEVICE)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    assert gpu_check.read_report(path) == run


def test_the_table_shows_counts_failures_and_figures() -> None:
    lines = gpu_check.table(gpu_check.report([GOOD, BAD, FAST], device=DEVICE)).splitlines()
    assert lines[0] == "Test GPU (sm_90, 132 SMs)"
    assert "exact: 1 of 2 passed" in lines
    assert [line.split() for line in lines if "FAILED" in line] == [
        ["FAILED", "b", "wrong", "weights", "3.000"],
        ["SOME", "CHECKS", "FAILED"],
    ]
    assert any(line.split() == ["a", "bandwidth", "2000.000", "GB/s"] for line in lines)


def test_a_comparison_gives_the_ratio_to_the_earlier_figure() -> None:
    earlier = gpu_check.report([Result("speed", "a", "bandwidth", 1000.0, "GB/s")], device=DEVICE)
    text = gpu_check.table(
        gpu_check.report([FAST, Result("speed", "new", "bandwidth", 1.0, "GB/s")], device=DEVICE), earlier=earlier
    )
    assert "2.000 x earlier" in text
    assert text.count("x earlier") == 1


def test_a_whole_run_writes_both_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_check, "device_facts", lambda _: DEVICE)
    monkeypatch.setitem(gpu_check.CHECKS, "copy", lambda _: iter([FAST]))
    monkeypatch.setitem(gpu_check.CHECKS, "product_close", lambda _: iter([BAD]))
    assert gpu_check.main(["--only", "copy"]) == 0
    assert json.loads(Path("gpu_check.json").read_text())["passed"] is True
    assert Path("gpu_check.txt").read_text() == capsys.readouterr().out
    assert gpu_check.main(["--only", "copy", "product_close", "--compare", "gpu_check.json"]) == 1
    assert "1.000 x earlier" in capsys.readouterr().out


def test_the_share_of_a_copy_is_bandwidth_over_bandwidth() -> None:
    results = {result.metric: result.value for result in gpu_check.speed("c", "a", 1e-6, 2_000_000, 4e12)}
    assert results == pytest.approx({"time": 1.0, "bandwidth": 2000.0, "share of copy": 0.5})


def test_twice_the_time_of_the_peer_is_half_as_fast() -> None:
    assert gpu_check.against("c", "a", "peer", peer_seconds=1.0, seconds=2.0).value == 0.5


def test_the_plans_beside_contain_the_chosen_one_and_no_empty_split() -> None:
    chosen = LaunchPlan(8, 32, 8)
    plans = gpu_check.plans_beside(chosen, 4096)
    assert chosen in plans
    assert len(set(plans)) == len(plans)
    assert {candidate.splits for candidate in plans} == {1, 4, 8, 16}
    assert all(candidate.splits == 1 for candidate in gpu_check.plans_beside(LaunchPlan(8, 32, 1), 192))


def test_weights_rotate_through_more_than_a_cache() -> None:
    weights = gpu_check.rotation((4096, 4096), CPU)
    total = sum(gpu_check.weight_nbytes(weight) for weight in weights)
    assert total > 0.9 * gpu_check.ROTATION_NBYTES
    assert len({weight.packed.data_ptr() for weight in weights}) == len(weights)


def test_the_peer_decodes_a_weight_to_the_same_values() -> None:
    """bitsandbytes on the CPU reads the state that the GPU comparison gives it."""
    from bitsandbytes import functional

    weight = gpu_check.random_weight((8, 512))
    found = functional.dequantize_4bit(weight.packed.view(-1, 1), gpu_check.bitsandbytes_state(weight))
    assert (gpu_check.bits(found.view(8, 512)) == gpu_check.reference_bits(weight, torch.bfloat16)).all()
