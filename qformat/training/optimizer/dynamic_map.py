"""Tables of the dynamic 8-bit data type of optimizer states.

The data type is from Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization. A code stands for a value in
[-1, 1], with a sign, a power of ten and a linear fraction. The number of leading zero bits gives the exponent; the bits
that remain are the fraction. The largest decade (0.1, 1] therefore has the most values, and the decade of 1e-7 has one.
The second moment is never negative, so its codes have no sign and one more bit for the fraction.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qformat.codec.codebooks import dynamic_map

HALF_STEP_SIGNED = 0.9 / 64 / 2
HALF_STEP_UNSIGNED = 0.9 / 128 / 2
"""Bounds of the rounding error for values in [-1, 1] (signed) and [0, 1] (unsigned), to be multiplied by the absmax of
the block. Rounding to the nearest value of the map errs by at most half of the widest gap, the step of the largest
decade."""


def dynamic_values(*, signed: bool) -> Tensor:
    """Return the 256 values of the data type in ascending order, float32 [256]. They include 0 and 1, but not -1."""
    return torch.from_numpy(dynamic_map(signed=signed))


@cache
def decoding_table(device: torch.device, *, signed: bool) -> Tensor:
    """Return `dynamic_values` on a device.

    Args:
        device: Device of the table.
        signed: Whether to return the map of the first moment (signed) or of the second moment (unsigned).

    Returns:
        The values, float32 [256].
    """
    return dynamic_values(signed=signed).to(device)


def encoding_borders(*, signed: bool) -> Tensor:
    """Return the borders between codes, float32 [255]: the code of x is the number of borders below x.

    The border between two values is their midpoint. The unsigned map has 0 as its first border, so that a positive
    second moment never becomes zero: the update divides by its square root, and would be as large as 1 / eps allows.
    """
    values = dynamic_values(signed=signed)
    borders = (values[:-1] + values[1:]) / 2
    if not signed:
        borders[0] = 0.0
    return borders


@cache
def encoding_table(device: torch.device, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return a lookup table from the upper 16 bits of a float32 x to its code.

    The code of x is the code in the table, plus one if x is above the border in the table. This is exact because floats
    with the same upper half are so close together that at most one border lies among them. On a CPU the lookup takes a
    twentieth of the time of a binary search.

    Args:
        device: Device of the table.
        signed: Whether to return the table of the first moment (signed) or of the second moment (unsigned).

    Returns:
        The codes, int32 [65536], and the borders, float32 [65536].
    """
    borders = encoding_borders(signed=signed)
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    both_ends = torch.stack([upper, upper | 0xFFFF])
    # Bit patterns of 2^31 and above are negative as int32.
    patterns = torch.where(both_ends >= 2**31, both_ends - 2**32, both_ends).to(torch.int32)
    ends = patterns.view(torch.float32).sort(dim=0).values
    codes = torch.searchsorted(borders, ends.contiguous())  # [2, 65536]
    ordered = ~ends.isnan().any(dim=0)
    assert bool(((codes[1] - codes[0])[ordered] <= 1).all())
    lower = torch.where(ordered, codes[0], 0)
    next_border = torch.cat([borders, torch.tensor([torch.inf])])[lower]
    return lower.to(torch.int32).to(device), next_border.to(device)
