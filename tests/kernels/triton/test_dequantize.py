"""Dequantization by Triton: the kernel in the interpreter, and the plan of the launch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import UsageError
from qformat.kernels.triton import launch as triton_launch
from qformat.kernels.triton.dequantize import TILE, LaunchPlan, dequantize, plan
from tests.kernels.triton.interpreter import run_interpreted
from tools.gpu.weights import random_weight


def test_the_kernel_equals_the_reference_under_the_interpreter() -> None:
    run_interpreted(Path(__file__).parent / "interpreted" / "dequantize.py")


def test_a_tile_has_only_one_nested_absmax() -> None:
    assert all(256 * block_size % TILE == 0 for block_size in BLOCK_SIZES)


@pytest.mark.parametrize(
    ("n_elements", "aligned", "expected"),
    [
        (TILE, True, LaunchPlan(1, "whole")),
        (3 * TILE, True, LaunchPlan(3, "whole")),
        (TILE - 1, True, LaunchPlan(1, "partial")),
        (TILE + 1, True, LaunchPlan(2, "mixed")),
        (3 * TILE, False, LaunchPlan(3, "partial")),
    ],
)
def test_the_plan_masks_only_partial_tiles(n_elements: int, aligned: bool, expected: LaunchPlan) -> None:
    assert plan(n_elements, aligned=aligned) == expected


def test_a_weight_on_a_cpu_is_rejected() -> None:
    with pytest.raises(UsageError, match="CUDA device, but the weight is on cpu"):
        dequantize(random_weight((4, 64)), torch.empty((4, 64), dtype=torch.bfloat16))


@pytest.mark.parametrize("out", [torch.empty((64, 4), dtype=torch.bfloat16), torch.empty((4, 64), dtype=torch.float64)])
def test_an_output_that_does_not_fit_is_rejected(out: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="expected bfloat16, float16 or float32"):
        dequantize(random_weight((4, 64)), out)


def test_a_strided_output_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "interpreting", lambda: True)
    with pytest.raises(UsageError, match="out: is not contiguous"):
        dequantize(random_weight((4, 64)), torch.empty((64, 4), dtype=torch.bfloat16).T)


def test_a_misaligned_output_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "interpreting", lambda: True)
    out = torch.empty(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64)
    with pytest.raises(UsageError, match=r"out: address 0x[0-9a-f]+ is not a multiple of 16"):
        dequantize(random_weight((4, 64)), out)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", 48, "block_size: found 48"),
        ("shape", (4, 65), "packed: found contiguous torch.uint8 with 128 entries"),
        ("absmax", torch.zeros(4), "absmax: found contiguous torch.float32"),
        ("absmax", torch.zeros(3, dtype=torch.uint8), "absmax: found contiguous torch.uint8 with 3 entries"),
        ("nested_absmax", torch.zeros(2), "nested_absmax"),
        ("nested_absmax", None, "pass both or neither"),
        ("nested_quant_map", torch.zeros(16), "nested_quant_map"),
        ("nested_quant_map", torch.zeros(512)[::2], "nested_quant_map: found strided"),
        ("absmax", torch.zeros(4, dtype=torch.uint8, device="meta"), "absmax: is on meta"),
    ],
)
def test_components_that_do_not_fit_each_other_are_rejected(field: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(random_weight((4, 64)), **{field: value})


def test_a_missing_triton_is_reported_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_launch.triton_unavailable.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "triton.language", None)
    reason = triton_launch.triton_unavailable()
    triton_launch.triton_unavailable.cache_clear()
    assert reason is not None
    assert reason.startswith("triton is not installed (")
    assert reason.endswith("Run pip install triton")
