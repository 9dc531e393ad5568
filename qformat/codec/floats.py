"""The three float formats of weights, and their conversions from and to float32 (spec section 6).

numpy has no bfloat16. Arrays of raw elements therefore hold 16-bit formats as bits in uint16, and float32 as float32.

All code rounds float32 to bfloat16 in the same way: to the nearest value, ties to even; overflow gives infinity, and
subnormals are kept. A NaN keeps its sign and the upper bits of its payload, and becomes quiet. `narrow` is the
reference; `cpu.scalars.rounded_to_bf16` and `cpu.lanes.narrowed` are bit-identical to it.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint16] | NDArray[np.float32]


class FloatFormat(Enum):
    """Float format of a weight. The value is its name in safetensors headers."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"

    @property
    def nbytes(self) -> int:
        """Size of one element in bytes."""
        return 4 if self is FloatFormat.F32 else 2

    @property
    def raw_dtype(self) -> np.dtype[np.uint16] | np.dtype[np.float32]:
        """Little-endian numpy dtype of raw elements, as in a file."""
        return np.dtype("<f4") if self is FloatFormat.F32 else np.dtype("<u2")

    @property
    def torch_name(self) -> str:
        """Name in torch, bitsandbytes and transformers: `bfloat16`, `float16` or `float32`."""
        return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[self.value]

    @classmethod
    def from_torch_name(cls, name: str) -> FloatFormat:
        """Return the format with the name of a torch dtype.

        Raises:
            KeyError: No format has this name.
        """
        return TORCH_NAMES[name]


TORCH_NAMES = {member.torch_name: member for member in FloatFormat}


def widen(raw: Raw, float_format: FloatFormat) -> NDArray[np.float32]:
    """Convert raw elements to float32. The conversion is exact.

    Args:
        raw: Raw elements, any shape.
        float_format: Float format of the elements.
    """
    if float_format is FloatFormat.F32:
        return raw.astype(np.float32, copy=False)
    if float_format is FloatFormat.F16:
        return raw.view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: NDArray[np.float32], float_format: FloatFormat) -> Raw:
    """Round float32 values to raw elements: to nearest, ties to even. Overflow gives infinity, and NaN stays NaN.

    Args:
        values: Values, any shape.
        float_format: Float format of the result.
    """
    if float_format is FloatFormat.F32:
        return values
    if float_format is FloatFormat.F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)
