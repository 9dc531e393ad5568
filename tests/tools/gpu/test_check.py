"""`tools.gpu.check` on a machine without a GPU: arguments, exit codes and the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.triton.interpreter import run_interpreted
from tests.tools.gpu.figures import BAD, DEVICE, FAST, GOOD
from tools.gpu import check as gpu_check
from tools.gpu.results import Result, Settings


def test_the_exactness_checks_run_under_the_interpreter() -> None:
    run_interpreted(Path(__file__).parent / "interpreted" / "exactness.py")


def test_without_a_gpu_it_reports_so_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main([]) == 2
    assert "torch found no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--compare", "missing.json"], ["--unknown"]])
def test_invalid_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2


def test_the_list_has_a_line_per_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu_check.CHECKS)
    assert all(len(line.split()) > 4 for line in lines)


def test_a_check_that_raises_fails_and_the_others_still_run() -> None:
    def broken(_: Settings) -> Iterator[Result]:
        yield GOOD
        raise RuntimeError("CUDA error: an illegal memory access")

    checks = {"broken": broken, "passed": lambda _: iter([FAST])}
    results = gpu_check.run_checks(["broken", "passed"], Settings(torch.device("cpu")), checks=checks)
    assert [(result.check, result.passed) for result in results] == [("broken", False), ("speed", None)]
    assert "illegal memory access" in results[0].case


def test_a_run_writes_both_files(
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
