"""The codec's functions on CPUs reject arrays of the wrong size or dtype."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.cpu import blocks
from qformat.codec.floats import FloatFormat, Raw
from qformat.errors import UsageError

PACKED, SCALES, OUT = np.zeros(64, np.uint8), np.ones(2, np.float32), np.empty(128, np.uint16)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "too few codes": (lambda: decode(PACKED[1:], SCALES, OUT), r"packed: .*shape \[63\], expected .*uint8 \[64\]"),
    "too few scales": (lambda: decode(PACKED, SCALES[1:], OUT), r"scales: .*expected .*float32 \[2\]"),
    "float64 scales": (lambda: decode(PACKED, SCALES.astype(np.float64), OUT), "scales: .*float64"),
    "a short buffer": (lambda: decode(PACKED, SCALES, OUT[1:]), "out: .*expected"),
    "a float32 buffer for bf16": (lambda: decode(PACKED, SCALES, OUT.astype(np.float32)), "out: .*float32.*expected"),
    "a strided buffer": (lambda: decode(PACKED, SCALES, np.empty(256, np.uint16)[::2]), "out: found strided"),
    "a matrix": (lambda: decode(PACKED.reshape(8, 8), SCALES, OUT), "packed: "),
    "block size 48": (lambda: decode(PACKED, SCALES, OUT, block_size=48), "block size 48: must be one of"),
    "no such group": (lambda: decode_nested(first_block=255), "blocks 255 to 257"),
    "a negative block": (lambda: decode_nested(first_block=-1), "blocks -1 to 1"),
    "a short map": (lambda: decode_nested(nested_quant_map=DYNAMIC_MAP[:255]), "nested_quant_map"),
    "a short code buffer": (
        lambda: blocks.encode_into(OUT, FloatFormat.BF16, block_size=64, packed=PACKED[1:], absmax=SCALES),
        "packed: ",
    ),
    "fp32 weights called bf16": (
        lambda: blocks.encode_into(SCALES, FloatFormat.BF16, block_size=64, packed=PACKED[:1], absmax=SCALES[:1]),
        "raw: ",
    ),
}  # fmt: skip


def decode(packed: NDArray[np.uint8], scales: NDArray[np.float32], out: Raw, *, block_size: int = 64) -> None:
    blocks.decode_into(packed, scales, n_elements=128, block_size=block_size, float_format=FloatFormat.BF16, out=out)


def decode_nested(*, first_block: int = 0, nested_quant_map: NDArray[np.float32] = DYNAMIC_MAP) -> None:
    blocks.decode_nested_into(
        PACKED, PACKED[:2], SCALES[:1], np.float32(0),
        n_elements=128, block_size=64, float_format=FloatFormat.BF16, out=OUT,
        nested_quant_map=nested_quant_map, first_block=first_block,
    )  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_of_the_wrong_size_or_dtype_are_rejected(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        call()
