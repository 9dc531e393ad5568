"""50 steps of training compared with bitsandbytes + PEFT, with `tools/quality/parity_training.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.sides import SAME_PRODUCTS
from tests.one_thread import one_thread
from tests.rounding import rounds_like
from tests.training import runs
from tools.quality import parity_training

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

N_STEPS = 50


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers. Tests must not modify it."""
    return runs.make_artifact(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(5, runs.VOCABULARY - 64, (2, 24), generator=random)] * N_STEPS


def trained(side: str, artifact: Path, batches: list[torch.Tensor], seed: int) -> tuple[list[float], list[Any]]:
    return parity_training.train(parity_training.load(side, artifact), batches, seed)


@pytest.mark.skipif(not SAME_PRODUCTS, reason="the CPU has no instructions for products of bf16: qformat uses fp32")
def test_unfused_losses_and_adapters_are_bit_identical_to_bitsandbytes(
    artifact: Path, batches: list[torch.Tensor]
) -> None:
    losses, adapters = trained("unfused", artifact, batches, 0)
    expected_losses, expected = trained("bitsandbytes", artifact, batches, 0)
    assert losses == expected_losses
    assert len(adapters) == 28
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(adapters, expected, strict=True))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_fused_losses_are_as_close_to_fp32_as_those_of_bitsandbytes(
    artifact: Path, batches: list[torch.Tensor], seed: int
) -> None:
    losses, expected, exact = (
        torch.tensor(trained(side, artifact, batches, seed)[0], dtype=torch.float64)
        for side in ("fused", "bitsandbytes", "fp32")
    )
    if SAME_PRODUCTS:
        assert losses[0] == expected[0]  # lora_B is zero
    assert not torch.equal(losses, expected)  # they round at different points
    assert rounds_like(losses, expected, exact)
