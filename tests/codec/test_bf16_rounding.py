"""All implementations round float32 to bfloat16 like torch, and follow the rule for NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qformat.codec.cpu.blocks import Instructions, decode_into
from qformat.codec.floats import FloatFormat, narrow
from qformat.codec.foreign.block_floats import E4M3, decode_e4m3
from qformat.codec.foreign.ggml_blocks import round_to_bf16
from tests.codec.cpu.sample_blocks import RUNNABLE

Bits = NDArray[np.uint16]

# Every upper half (all signs, exponents and NaN payloads) with lower halves on, next to and far from a tie.
LOWER_HALVES = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
PATTERNS = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | LOWER_HALVES).reshape(-1)
VALUES = PATTERNS.view(np.float32)


def expected() -> Bits:
    """Return torch's rounding; a NaN keeps its sign and upper payload and is quiet."""
    rounded = torch.from_numpy(VALUES).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(VALUES), (PATTERNS >> 16 | 0x40).astype(np.uint16), rounded)


def by_the_reference() -> Bits:
    return np.asarray(narrow(VALUES, FloatFormat.BF16), np.uint16)


def by_the_ggml_kernel() -> Bits:
    out = np.empty(VALUES.size, np.uint16)
    round_to_bf16(VALUES, out)
    return out


def by_the_fp8_decoder() -> Bits:
    """Decode a matrix of ones with single columns as blocks: the scale of each block is the value."""
    one = int(np.flatnonzero(E4M3 == 1)[0])
    found = []
    for scales in np.array_split(VALUES, 96):
        out = np.empty(scales.size, np.uint16)
        decode_e4m3(np.full(scales.size, one, np.uint8), 0, 1, scales.size, 1, 1, scales, out)
        found.append(out)
    return np.concatenate(found)


def by_the_decoder(instructions: Instructions) -> Callable[[], Bits]:
    def decode() -> Bits:
        """Decode blocks of code 15, which is 1: the scale of each block is the value."""
        out = np.empty(VALUES.size * 32, np.uint16)
        decode_into(
            np.full(out.size // 2, 0xFF, np.uint8),
            VALUES,
            n_elements=out.size,
            block_size=32,
            float_format=FloatFormat.BF16,
            out=out,
            decoder=instructions,
        )
        assert (out.reshape(-1, 32) == out[::32, None]).all()
        return out[::32]

    return decode


IMPLEMENTATIONS = {
    "reference": by_the_reference,
    "ggml": by_the_ggml_kernel,
    "fp8": by_the_fp8_decoder,
    **{f"decoder, {instructions}": by_the_decoder(instructions) for instructions in RUNNABLE},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_pattern_is_rounded_to_the_same_bits(implementation: str) -> None:
    found, wanted = IMPLEMENTATIONS[implementation](), expected()
    wrong = np.flatnonzero(found != wanted)
    shown = [f"{PATTERNS[i]:08X}: {found[i]:04X}, expected {wanted[i]:04X}" for i in wrong[:5]]
    assert not wrong.size, shown


def test_the_patterns_include_every_kind_of_number() -> None:
    upper, lower = PATTERNS >> 16, PATTERNS & 0xFFFF
    signalling = np.isnan(VALUES) & ((upper & 0x40) == 0)
    overflowing = (upper & 0x7FFF == 0x7F7F) & (lower >= 0x8000)
    subnormal = (PATTERNS & 0x7F800000 == 0) & (PATTERNS & 0x7FFFFF != 0)
    for kind in (signalling, overflowing, subnormal, lower == 0x8000, np.isinf(VALUES)):
        for sign in (0, 1):
            assert (kind & (upper >> 15 == sign)).any()
