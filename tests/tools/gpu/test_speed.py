"""Speed figures on a machine without a GPU: ratios, launches to try, weights to rotate."""

from __future__ import annotations

import pytest
import torch

from qformat.kernels.triton.product import LaunchPlan
from tools.gpu.bitsandbytes_peer import bitsandbytes_state
from tools.gpu.results import Settings
from tools.gpu.speed import ROTATION_NBYTES, against, plans_beside, rotation, speed, weight_nbytes
from tools.gpu.weights import bits, random_weight, reference_bits

CPU = Settings(torch.device("cpu"))


def test_the_share_of_a_copy_is_bandwidth_over_bandwidth() -> None:
    results = {result.metric: result.value for result in speed("c", "a", 1e-6, 2_000_000, 4e12)}
    assert results == pytest.approx({"time": 1.0, "bandwidth": 2000.0, "share of copy": 0.5})


def test_twice_the_time_of_the_peer_is_half_as_fast() -> None:
    assert against("c", "a", "peer", peer_seconds=1.0, seconds=2.0).value == 0.5


def test_the_plans_beside_contain_the_chosen_one_and_no_empty_split() -> None:
    chosen = LaunchPlan(8, 32, 8)
    plans = plans_beside(chosen, 4096)
    assert chosen in plans
    assert len(set(plans)) == len(plans)
    assert {candidate.splits for candidate in plans} == {1, 4, 8, 16}
    assert all(candidate.splits == 1 for candidate in plans_beside(LaunchPlan(8, 32, 1), 192))


def test_weights_rotate_through_more_than_a_cache() -> None:
    weights = rotation((4096, 4096), CPU)
    total = sum(weight_nbytes(weight) for weight in weights)
    assert total > 0.9 * ROTATION_NBYTES
    assert len({weight.packed.data_ptr() for weight in weights}) == len(weights)


def test_the_peer_decodes_a_weight_to_the_same_values() -> None:
    """bitsandbytes decodes the state of the GPU comparison on the CPU."""
    from bitsandbytes import functional

    weight = random_weight((8, 512))
    found = functional.dequantize_4bit(weight.packed.view(-1, 1), bitsandbytes_state(weight))
    assert (bits(found.view(8, 512)) == reference_bits(weight, torch.bfloat16)).all()
