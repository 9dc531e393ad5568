"""Sums over blocks by Triton: the kernel in the interpreter, and invalid arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qformat.errors import UsageError
from qformat.kernels.triton.block_dots import block_dots
from tests.kernels.triton.interpreter import run_interpreted
from tools.gpu.weights import random_codes


def test_the_kernel_equals_float64_under_the_interpreter() -> None:
    run_interpreted(Path(__file__).parent / "interpreted" / "block_dots.py")


@pytest.mark.parametrize(
    ("values", "packed", "out", "message"),
    [
        (torch.zeros(64), random_codes(66), torch.zeros(1), "with 64 entries and packed torch.uint8 with 33"),
        (torch.zeros(64, dtype=torch.float64), random_codes(64), torch.zeros(1), "values: found torch.float64"),
        (torch.zeros(65), random_codes(65), torch.zeros(1), "expected torch.float32 with 2"),
        (torch.zeros(64), random_codes(64), torch.zeros(1), "CUDA device, but the weight is on cpu"),
    ],
)
def test_tensors_that_do_not_fit_are_rejected(
    values: torch.Tensor, packed: torch.Tensor, out: torch.Tensor, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        block_dots(values, packed, 64, out)
