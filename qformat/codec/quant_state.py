"""The quant_state record of a packed tensor and its JSON form (spec section 5.3).

The keys and their order are those of bitsandbytes, whose reader accepts no other key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from qformat import strict_json
from qformat.codec.floats import TORCH_NAMES, FloatFormat
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import ArtifactError, Reason

ALIGNMENT = 64
"""The JSON text is padded with spaces to a multiple of this number of bytes."""

MAX_NBYTES = 4096
LARGEST_OFFSET_LITERAL = 24
"""Largest number of characters in the shortest decimal that identifies a float64."""

_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")


@dataclass(frozen=True, slots=True)
class QuantState:
    """Properties of a packed tensor that decoding needs.

    Attributes:
        block_size: Number of elements per block.
        float_format: Float format of the source tensor.
        shape: Shape of the weight.
        nested_offset: Mean of the absmax values, None without double quantization.
        nested_dtype: Torch name of the dtype of the nested absmax values in the writer's memory. bitsandbytes writes
            bfloat16 after it has run a model on some CPUs; qformat always writes float32.
    """

    block_size: int
    float_format: FloatFormat
    shape: tuple[int, ...]
    nested_offset: float | None
    nested_dtype: str = "float32"

    def to_json(self) -> bytes:
        """Return the JSON text without padding, exactly as bitsandbytes writes it."""
        record: list[tuple[str, str]] = [
            ("quant_type", '"nf4"'),
            ("blocksize", str(self.block_size)),
            ("dtype", f'"{self.float_format.torch_name}"'),
            ("shape", "[" + ", ".join(map(str, self.shape)) + "]"),
        ]
        if self.nested_offset is not None:
            record += [
                ("nested_blocksize", str(NESTED_BLOCK_SIZE)),
                ("nested_dtype", f'"{self.nested_dtype}"'),
                ("nested_offset", repr(self.nested_offset)),
            ]
        return ("{" + ", ".join(f'"{key}": {value}' for key, value in record) + "}").encode("ascii")

    def to_padded_json(self) -> bytes:
        """Return the JSON text padded with spaces to `padded_nbytes`."""
        size = padded_nbytes(
            block_size=self.block_size,
            float_format=self.float_format,
            shape=self.shape,
            double_quant=self.nested_offset is not None,
        )
        return self.to_json().ljust(size, b" ")


@lru_cache(maxsize=4096)
def padded_nbytes(*, block_size: int, float_format: FloatFormat, shape: tuple[int, ...], double_quant: bool) -> int:
    """Return the size of the padded record in bytes. It does not depend on the value of the nested offset.

    Args:
        block_size: Number of elements per block.
        float_format: Float format of the source tensor.
        shape: Shape of the weight.
        double_quant: Whether the absmax values are quantized as well.
    """
    placeholder = QuantState(block_size, float_format, shape, 0.0 if double_quant else None)
    longest = len(placeholder.to_json()) + (LARGEST_OFFSET_LITERAL - len("0.0") if double_quant else 0)
    return -(-longest // ALIGNMENT) * ALIGNMENT


def parse(data: bytes, *, path: Path | str, tensor: str) -> QuantState:
    """Parse and check the bytes of a quant_state component.

    Args:
        data: Bytes of the component.
        path: Path of the shard, for error messages.
        tensor: Name of the packed tensor, for error messages.

    Raises:
        ArtifactError: The record is invalid (json_*, quant_state).
    """
    record = strict_json.loads(data.rstrip(b" "), path=path, max_nbytes=MAX_NBYTES, error=ArtifactError, tensor=tensor)

    def refuse(field: str, problem: str) -> ArtifactError:
        return ArtifactError(Reason.QUANT_STATE, path, problem, tensor=tensor, field=field)

    if not isinstance(record, dict):
        raise refuse("quant_state", "is not a JSON object")
    nested = any(key in record for key in _NESTED_KEYS)
    expected = _KEYS + _NESTED_KEYS if nested else _KEYS
    for key in expected:
        if key not in record:
            raise refuse(key, "is missing")
    for key in record:
        if key not in expected:
            raise refuse(key, f"is an unknown key, expected only {', '.join(expected)}")
    if record["quant_type"] != "nf4":
        raise refuse("quant_type", f"is {record['quant_type']!r}, expected 'nf4'")
    block_size = record["blocksize"]
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise refuse("blocksize", f"is {block_size!r}, expected one of {BLOCK_SIZES}")
    dtype = record["dtype"]
    if not isinstance(dtype, str) or dtype not in TORCH_NAMES:
        raise refuse("dtype", f"is {dtype!r}, expected bfloat16, float16 or float32")
    shape = record["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise refuse("shape", f"is {shape!r}, expected a list of sizes")
    offset: float | None = None
    nested_dtype = "float32"
    if nested:
        if record["nested_blocksize"] != NESTED_BLOCK_SIZE or type(record["nested_blocksize"]) is not int:
            raise refuse("nested_blocksize", f"is {record['nested_blocksize']!r}, expected {NESTED_BLOCK_SIZE}")
        if record["nested_dtype"] not in ("float32", "bfloat16"):
            raise refuse("nested_dtype", f"is {record['nested_dtype']!r}, expected float32 or bfloat16")
        nested_dtype = str(record["nested_dtype"])
        raw_offset = record["nested_offset"]
        if type(raw_offset) not in (int, float) or not math.isfinite(float(raw_offset)):  # type: ignore[arg-type]
            raise refuse("nested_offset", f"is {raw_offset!r}, expected a finite number")
        offset = float(raw_offset)  # type: ignore[arg-type]
        if abs(offset) > 3.4028234663852886e38:
            raise refuse("nested_offset", f"is {offset!r}, which is outside the range of float32")
    return QuantState(
        block_size=block_size,
        float_format=FloatFormat.from_torch_name(str(dtype)),
        shape=tuple(int(size) for size in shape if isinstance(size, int)),
        nested_offset=offset,
        nested_dtype=nested_dtype,
    )
