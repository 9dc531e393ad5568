"""The exactness checks of tools/gpu in Triton's interpreter (run by test_check)."""

from __future__ import annotations

import torch

from tests.kernels.triton.interpreter import patch

patch()

from tools.gpu import exactness  # noqa: E402
from tools.gpu.results import Settings  # noqa: E402
from tools.gpu.weights import random_weight  # noqa: E402

CPU = Settings(torch.device("cpu"), quick=True)


def test_the_dequantization_check_passes() -> None:
    results = list(exactness.check_dequantize_exact(CPU))
    assert len(results) == 4 * 4 * 2 * 3
    assert all(result.passed for result in results)


def test_the_check_of_sums_over_blocks_passes() -> None:
    results = list(exactness.check_block_dots_close(CPU))
    assert len(results) == 4 * 4 * 3
    assert all(result.passed for result in results)


def test_the_product_check_finds_each_wrong_weight() -> None:
    weight = random_weight((20, 64))
    assert exactness.wrong_weights(weight, torch.bfloat16) == 0
    right = exactness.reference_bits

    def other(*arguments: object) -> object:
        bits = right(*arguments).copy()
        bits[3, 5] ^= 1
        return bits

    exactness.reference_bits = other
    try:
        assert exactness.wrong_weights(weight, torch.bfloat16) == 2  # once in each of the two plans
    finally:
        exactness.reference_bits = right
