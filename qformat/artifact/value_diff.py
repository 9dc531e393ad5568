"""Comparison of the codes, scales and values of a tensor in two local artifacts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.reading.reader import Artifact, KeptTensor, PackedTensor

_CHUNK_NBYTES = 2**24
"""Number of bytes to compare at a time. numpy makes several copies of this size."""


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """Numbers of values that differ between two tensors. A number is None if it cannot be determined.

    Attributes:
        name: Name of the tensor.
        n_elements: Number of elements.
        n_codes: Number of codes that differ.
        n_blocks: Number of blocks.
        n_scales: Number of decoded scales that differ.
        n_values: Number of elements of a kept tensor that differ.
    """

    name: str
    n_elements: int
    n_codes: int | None = None
    n_blocks: int | None = None
    n_scales: int | None = None
    n_values: int | None = None


def diff_values(a: Artifact, b: Artifact, name: str) -> ValueDifference | None:
    """Count the values that differ in a tensor of both artifacts.

    Args:
        a: First artifact.
        b: Second artifact.
        name: Name of the tensor.

    Returns:
        The counts, or None if the tensors have different shapes or encodings.
    """
    one, other = a[name], b[name]
    if one.shape != other.shape:
        return None
    if isinstance(one, KeptTensor) and isinstance(other, KeptTensor):
        if one.dtype != other.dtype:
            return None
        return ValueDifference(name, one.data.size, n_values=_n_other_elements(one.data, other.data))
    if not isinstance(one, PackedTensor) or not isinstance(other, PackedTensor):
        return None
    n_codes = _n_other_codes(one.packed, other.packed, one.layout.n_elements)
    if one.layout.block_size != other.layout.block_size:
        return ValueDifference(name, one.layout.n_elements, n_codes)
    n_scales = _n_other_elements(one.scales(), other.scales())
    return ValueDifference(name, one.layout.n_elements, n_codes, one.layout.n_blocks, n_scales)


def _n_other_codes(a: NDArray[np.uint8], b: NDArray[np.uint8], n_elements: int) -> int:
    """Count the codes that differ. With an odd number of elements the last low nibble is not a code."""
    count = 0
    for start in range(0, a.size, _CHUNK_NBYTES):
        changed = a[start : start + _CHUNK_NBYTES] ^ b[start : start + _CHUNK_NBYTES]
        count += int(np.count_nonzero(changed & 0xF0) + np.count_nonzero(changed & 0x0F))
    padded = n_elements % 2 == 1 and (int(a[-1]) ^ int(b[-1])) & 0x0F != 0
    return count - padded


def _n_other_elements(a: NDArray[Any], b: NDArray[Any]) -> int:
    """Count the elements whose bits differ."""
    width = a.dtype.itemsize
    one, other = (np.ascontiguousarray(part).reshape(-1).view(np.uint8).reshape(-1, width) for part in (a, b))
    step = max(1, _CHUNK_NBYTES // width)
    return sum(
        int(np.count_nonzero((one[start : start + step] != other[start : start + step]).any(axis=1)))
        for start in range(0, len(one), step)
    )
