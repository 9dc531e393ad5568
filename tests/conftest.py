"""Fixtures that several test directories share."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.repository import ROOT

os.environ["HF_HUB_OFFLINE"] = "1"
# Several processes run tests at the same time. Threads that spin would take the cores from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A process that a shell starts in the background ignores Ctrl-C, and so do its children: tests that interrupt a child
# would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Hide a million objects of imported modules and tests from the garbage collector.

    They live as long as the process, and accelerate runs a full collection at the end of every training.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter free everything at its end: triton reports what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct as a bf16 checkpoint of three shards; built once, shared with `make demo`."""
    folder = ROOT / "demo"
    source = folder / "SmolLM2-135M-Instruct"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (source / "config.json").exists():
            import subprocess

            script = (
                "import sys; from pathlib import Path; from tools import demo; "
                "demo.build_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))"
            )
            subprocess.run([sys.executable, "-c", script, str(folder), str(source)], check=True, cwd=ROOT)
    return source
