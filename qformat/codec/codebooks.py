"""The two codebooks of the format: NF4 and the 8-bit dynamic map (spec sections 4.1 and 5.1).

Sources: NF4 is the table of QLoRA (arXiv:2305.14314, appendix E); the dynamic map is the signed tree data type of
"8-bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561) as bitsandbytes builds it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NF4_BITS = (
    0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
    0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
)  # fmt: skip


def dynamic_map(*, signed: bool) -> NDArray[np.float32]:
    """Return the 256 ascending values of a dynamic map: means between linear boundaries in 7 decades, 0 and 1.

    Args:
        signed: Return the map of spec section 5.1, whose values have both signs. Otherwise return the map with twice as
            many values per decade, which is not part of the format: optimizer states use it for the second moment.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2 ** (exponent + (not signed)) + 1
        index = np.arange(count)
        step = np.float64(np.float32(np.float32(0.9) / np.float32(count - 1)))
        low = np.float64(np.float32(0.1)) + step * index
        high = 1.0 - step * (count - 1 - index)
        boundaries = np.where(index < count // 2, low, high).astype(np.float32)
        means = (boundaries[:-1] + boundaries[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (exponent - 6)) * means
        values += [*magnitudes.tolist(), *((-magnitudes).tolist() if signed else [])]
    return np.array(sorted(values), dtype=np.float32)


def _frozen(table: NDArray[np.float32]) -> NDArray[np.float32]:
    table.setflags(write=False)
    return table


NF4_CODEBOOK = _frozen(np.array(_NF4_BITS, dtype=np.uint32).view(np.float32))
"""Value of each code in ascending order, float32 [16]. Code 7 is exactly 0."""

NF4_THRESHOLDS = _frozen((NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / np.float32(2))
"""Midpoints of neighbouring values, float32 [15]. The code of a scaled weight is the number of midpoints below it."""

DYNAMIC_MAP = _frozen(dynamic_map(signed=True))
"""Value of each 8-bit absmax code in ascending order, float32 [256]. Code 127 is exactly 0."""

DYNAMIC_THRESHOLDS = _frozen((DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2))
"""Midpoints of neighbouring values of the dynamic map, float32 [255]."""
