"""The three float formats that a weight may have, and exact conversions from and to float32 (spec section 6).

numpy has no bfloat16: 16-bit formats travel as their bit patterns in uint16 arrays ("raw"), fp32 as float32.

The one rule for float32 to bfloat16, whoever rounds: to the nearest value, ties to the even one; what is too large
becomes infinity; subnormals are kept. A NaN stays a NaN: it keeps its sign and the upper bits of its payload, and is
quiet. `narrow` is the definition; `cpu.scalars.rounded_to_bf16` and `cpu.lanes.narrowed` give the same bits.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint16] | NDArray[np.float32]


class FloatFormat(Enum):
    """A float format: its value is the name that safetensors headers use."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"

    @property
    def nbytes(self) -> int:
        """Bytes of one element."""
        return 4 if self is FloatFormat.F32 else 2

    @property
    def raw_dtype(self) -> np.dtype[np.uint16] | np.dtype[np.float32]:
        """The little-endian numpy dtype that holds elements of this format as they lie in a file."""
        return np.dtype("<f4") if self is FloatFormat.F32 else np.dtype("<u2")

    @property
    def torch_name(self) -> str:
        """The name that bitsandbytes and transformers write: `bfloat16`, `float16` or `float32`."""
        return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[self.value]

    @classmethod
    def from_torch_name(cls, name: str) -> FloatFormat:
        """Return the format of a torch dtype name. Raises KeyError for any other name."""
        return TORCH_NAMES[name]


TORCH_NAMES = {member.torch_name: member for member in FloatFormat}


def widen(raw: Raw, float_format: FloatFormat) -> NDArray[np.float32]:
    """Return the float32 values (same shape) of raw elements. Exact."""
    if float_format is FloatFormat.F32:
        return raw.astype(np.float32, copy=False)
    if float_format is FloatFormat.F16:
        return raw.view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: NDArray[np.float32], float_format: FloatFormat) -> Raw:
    """Round float32 values (same shape) to nearest, ties to even; overflow gives infinity, NaN stays NaN."""
    if float_format is FloatFormat.F32:
        return values
    if float_format is FloatFormat.F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)
