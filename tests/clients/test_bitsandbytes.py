"""bitsandbytes' own tests of its 4-bit functions, run on qformat's encoder, decoder and product.

The tests are in bitsandbytes' repository and in no file that pip installs. QFORMAT_BITSANDBYTES_SOURCE names a checkout
of the installed version.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional

from tests.clients import bitsandbytes_shim as shim
from tests.repository import ROOT

VARIABLE = "QFORMAT_BITSANDBYTES_SOURCE"
SELECTION = "TestQuantize4BitFunctional and nf4"

SKIPPED = {
    r"(?i)cuda|hpu|xpu|mps|rocm|gpu": "a device that this machine does not have",
    r"(?i)not supported on cpu|cpu": "a case that bitsandbytes itself does not have on CPUs",
    r"empty parameter set": "a test that is parametrized by devices that this machine does not have",
    r"(?i)benchmark": "a measurement",
}
"""Reasons of bitsandbytes to skip a case, and what they mean here."""

BREAKS = """
import bitsandbytes.functional as F
import pytest, torch

class TestQuantize4BitFunctional:
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_round_trip(self, quant_type):
        values = torch.randn(64, 128)
        packed, state = F.quantize_4bit(values, quant_type=quant_type, compress_statistics=True)
        error = (F.dequantize_4bit(packed, state) - values).abs().mean()
        assert error < 0.15
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the selected tests of a checkout with our functions in place of bitsandbytes'."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.clients.bitsandbytes_shim", "-p", "no:cacheprovider"]
    options = ["-q", "-rs", "-k", SELECTION, "-W", "ignore", "tests/test_functional.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    return subprocess.run(
        [*command, *options], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def counts(printed: str) -> dict[str, int]:
    line = next(line for line in printed.splitlines() if line.startswith(shim.CALLS))
    return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_the_shim_speaks_the_language_of_bitsandbytes(dtype: torch.dtype, nested: bool) -> None:
    """Its results mean the same to bitsandbytes' functions as bitsandbytes' own do."""
    values = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = shim.quantize_4bit(values, compress_statistics=nested, quant_type="nf4")
    theirs = functional.quantize_4bit(values, compress_statistics=nested, quant_type="nf4")
    assert torch.equal(ours[0], theirs[0])
    for packed, state in (ours, theirs):
        assert torch.equal(shim.dequantize_4bit(packed, state), functional.dequantize_4bit(packed, state))
    x = values[:3]
    product = shim.matmul_4bit(x, theirs[0], theirs[1])
    torch.testing.assert_close(product, bitsandbytes.matmul_4bit(x, *theirs))


@pytest.mark.slow
def test_a_run_counts_our_calls(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_functional.py").write_text(BREAKS)
    ran = run(tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed, 1 deselected" in ran.stdout
    assert counts(ran.stdout) == {"encode": 1, "decode": 1}


@pytest.mark.slow
def test_bitsandbytes_own_tests_pass_on_our_functions() -> None:
    folder = os.environ.get(VARIABLE)
    if folder is None:
        pytest.skip(f"{VARIABLE} does not name a checkout of bitsandbytes {bitsandbytes.__version__}")
    ran = run(Path(folder))
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    found = counts(ran.stdout)
    assert min(found.get(name, 0) for name in ("encode", "decode", "product")) > 100
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", ran.stdout, re.MULTILINE)
    assert {reason for reason in reasons if not any(re.search(known, reason) for known in SKIPPED)} == set()
