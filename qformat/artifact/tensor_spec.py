"""What a safetensors header says of one tensor: its name, dtype and shape, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ELEMENT_NBYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element of each dtype that a header may name."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its data. dtype: safetensors' name, as in "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """Elements of the tensor; a scalar has one."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data. Raises KeyError for a dtype that no header may name."""
        return data_nbytes(self.dtype, self.shape)


def data_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor's data. Raises KeyError for a dtype that no header may name."""
    return math.prod(shape) * ELEMENT_NBYTES[dtype]
