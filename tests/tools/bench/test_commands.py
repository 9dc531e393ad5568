"""The benchmarks that docs/benchmarks.md shows run to their end on a small model. Their figures are not judged here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qformat
from tests.repository import ROOT

ONE_LAYER = ["--layers", "1", "--runs", "1"]
COMMANDS = {
    "codec": ["--shapes", "64x64", "--runs", "1"],
    "convert": ONE_LAYER,
    "data": ["--rows", "50", "--peer-rows", "50", "--kind", "text"],
    "evaluate": [
        "ART",
        "SRC",
        "--data",
        str(ROOT / "LICENSE"),
        "--windows",
        "1",
        "--window-length",
        "32",
        "--rounds",
        "1",
    ],
    "export": ONE_LAYER,
    "generate": ["ART", "--prompts", "8", "--tokens", "2", "--rounds", "1"],
    "hub": ONE_LAYER,
    "kernels": ["--shapes", "64x64", "--rounds", "1", "--rows", "1"],
    "load": [*ONE_LAYER, "--tokens", "2"],
    "optimizer": ["--repeats", "1", "--only", "8-bit", "--size", "10M parameters, 99 tensors"],
    "sources": ONE_LAYER,
    "train": ["--sizes", "100M", "--shapes", "1x8", "--rounds", "1"],
    "tune": ["ART", "SRC", "--shape", "1x16", "--rounds", "1"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def artifact(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "artifact"
    qformat.convert(smollm2, out)
    return out


def test_every_benchmark_is_run() -> None:
    assert COMMANDS.keys() == {path.stem for path in (ROOT / "tools" / "bench").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_benchmark_runs(name: str, smollm2: Path, artifact: Path) -> None:
    places = {"ART": str(artifact), "SRC": str(smollm2)}
    arguments = [places.get(argument, argument) for argument in COMMANDS[name]]
    done = subprocess.run(
        [sys.executable, "-m", f"tools.bench.{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
