"""A training that waits while another process tokenises the same data can be interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.standstill import GUARD_S, HELD

# A second open file holds the lock, so the training waits for it.
CHILD = f"""
import fcntl, os, sys
real = fcntl.flock
def flock(descriptor, how):
    if not how & fcntl.LOCK_NB:
        other = os.open(f"/proc/self/fd/{{descriptor}}", os.O_RDWR)
        real(other, fcntl.LOCK_EX)
        os.write(1, b"{HELD}\\n")
    real(descriptor, how)
fcntl.flock = flock
from qformat.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_waiting_training_hears_signals(
    artifact: Path, examples: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ["train", artifact, tmp_path / "out", "--data", examples, "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any(line == f"{HELD}\n" for line in process.stdout)
    for _ in range(2):  # a signal just before the system call starts does not end it: send another
        process.send_signal(number)
        try:
            process.wait(timeout=GUARD_S / 2)
            break
        except subprocess.TimeoutExpired:
            continue
    _, said = process.communicate(timeout=GUARD_S)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("Interrupted.")
    assert not (tmp_path / "out").exists()
