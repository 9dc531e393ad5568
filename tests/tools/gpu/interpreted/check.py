"""The exactness checks of tools/gpu/check.py in Triton's interpreter (run by test_gpu_check)."""

from __future__ import annotations

import torch

from tests.kernels.triton.interpreter import patch

patch()

from tools.gpu import check as gpu_check  # noqa: E402

CPU = gpu_check.Settings(torch.device("cpu"), quick=True)


def test_the_dequantization_check_passes() -> None:
    results = list(gpu_check.check_dequantize_exact(CPU))
    assert len(results) == 4 * 4 * 2 * 3
    assert all(result.passed for result in results)


def test_the_check_of_sums_over_blocks_passes() -> None:
    results = list(gpu_check.check_block_dots_close(CPU))
    assert len(results) == 4 * 4 * 3
    assert all(result.passed for result in results)


def test_the_product_check_finds_each_wrong_weight() -> None:
    weight = gpu_check.random_weight((20, 64))
    assert gpu_check.wrong_weights(weight, torch.bfloat16) == 0
    right = gpu_check.reference_bits

    def other(*arguments: object) -> object:
        bits = right(*arguments).copy()
        bits[3, 5] ^= 1
        return bits

    gpu_check.reference_bits = other
    try:
        assert gpu_check.wrong_weights(weight, torch.bfloat16) == 2  # once in each of the two plans
    finally:
        gpu_check.reference_bits = right
