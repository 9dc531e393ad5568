"""A backend prepares data from a weight once per dtype and keeps it with the weight's holder."""

from __future__ import annotations

import torch

from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.packed_weight import PackedWeight
from tools.gpu.weights import random_weight


def test_data_is_prepared_once_per_dtype_and_holder() -> None:
    weight = random_weight((5, 64))
    made: list[torch.dtype] = []

    def prepare(prepared_of: PackedWeight, dtype: torch.dtype) -> int:
        assert prepared_of is weight
        made.append(dtype)
        return len(made)

    held, another = HeldWeight(weight), HeldWeight(weight)
    found = [held.prepared(dtype, prepare) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    assert found == [1, 2, 1]
    assert another.prepared(torch.bfloat16, prepare) == 3
