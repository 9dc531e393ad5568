"""The dynamic 8-bit data type of optimizer states: Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization.

A value in [-1, 1] is a sign, a power of ten and a linear fraction; a run of zero bits gives the exponent, and what it
leaves of the eight bits is the fraction. So the largest decade (0.1, 1] has the most values and 1e-7 has one. The
second moment has no sign: its bit goes to the fraction.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qformat.codec.codebooks import dynamic_map

HALF_STEP_SIGNED = 0.9 / 64 / 2
HALF_STEP_UNSIGNED = 0.9 / 128 / 2
"""The bound: rounding to the nearest value of the map moves a number of [-1, 1], or [0, 1], by no more than half of the
widest gap, which is the step of the largest decade. In a block it is that times absmax."""


def dynamic_values(*, signed: bool) -> Tensor:
    """Return the 256 values of the data type, float32 [256], increasing; 0 and 1 are among them, -1 is not."""
    return torch.from_numpy(dynamic_map(signed=signed))


@cache
def decoding_table(device: torch.device, *, signed: bool) -> Tensor:
    """Return `dynamic_values` on a device."""
    return dynamic_values(signed=signed).to(device)


def encoding_borders(*, signed: bool) -> Tensor:
    """Return float32 [255]: the code of x is the number of borders below x.

    Between two values the border is their midpoint. A second moment is never rounded down to zero: the step that
    divides by its root would be as large as 1 / eps allows. Its first border is therefore 0.
    """
    values = dynamic_values(signed=signed)
    borders = (values[:-1] + values[1:]) / 2
    if not signed:
        borders[0] = 0.0
    return borders


@cache
def encoding_table(device: torch.device, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return, for the upper 16 bits of a float32 x: int32 [65536] codes, float32 [65536] borders.

    The code of x is that code, plus one if x is above that border: floats that share their upper half lie so close
    together that no more than one border is among them. On a CPU this takes a twentieth of a binary search.
    """
    borders = encoding_borders(signed=signed)
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    both_ends = torch.stack([upper, upper | 0xFFFF])
    # Bit patterns from 2^31 on are negative numbers, as they are negative int32.
    patterns = torch.where(both_ends >= 2**31, both_ends - 2**32, both_ends).to(torch.int32)
    ends = patterns.view(torch.float32).sort(dim=0).values
    codes = torch.searchsorted(borders, ends.contiguous())  # [2, 65536]
    ordered = ~ends.isnan().any(dim=0)
    assert bool(((codes[1] - codes[0])[ordered] <= 1).all())
    lower = torch.where(ordered, codes[0], 0)
    next_border = torch.cat([borders, torch.tensor([torch.inf])])[lower]
    return lower.to(torch.int32).to(device), next_border.to(device)
