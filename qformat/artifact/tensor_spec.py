"""Name, dtype and shape of a tensor in a safetensors header, and the sizes that follow from them."""

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
"""Size of one element in bytes, for each supported dtype."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Description of a tensor without its data.

    Attributes:
        name: Name of the tensor.
        dtype: Name of its dtype in safetensors, such as "BF16".
        shape: Shape of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """Number of elements; a scalar has one."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes.

        Raises:
            KeyError: The dtype is not supported.
        """
        return data_nbytes(self.dtype, self.shape)


def data_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor's data in bytes.

    Args:
        dtype: Name of the dtype in safetensors.
        shape: Shape of the tensor.

    Raises:
        KeyError: The dtype is not supported.
    """
    return math.prod(shape) * ELEMENT_NBYTES[dtype]
