"""Encoding on CPUs is bit-identical to the reference at every size, in parts and in threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qformat.codec import nf4
from qformat.codec.codebooks import NF4_THRESHOLDS
from qformat.codec.cpu import blocks
from qformat.codec.cpu.blocks import Instructions
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from tests.codec.cpu.sample_blocks import FORMATS, RUNNABLE, STEADY, Guarded, as_mapped, sizes_around, weights

F16_LARGEST = 65504.0
F32_LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("float_format", FORMATS)
def test_encode_equals_the_reference_at_every_size_and_writes_nothing_else(
    float_format: FloatFormat, block_size: int, name: Instructions
) -> None:
    for n in sizes_around(block_size):
        raw = weights(n, float_format, seed=n)
        packed = Guarded(nf4.packed_nbytes(n), np.uint8)
        absmax = Guarded(nf4.block_count(n, block_size), np.float32)
        assert blocks.encode_into(
            as_mapped(raw), float_format, block_size=block_size, packed=packed.array, absmax=absmax.array, encoder=name
        )  # fmt: skip
        expected_packed, expected_absmax = nf4.encode(widen(raw, float_format), block_size=block_size)
        assert packed.tobytes() == expected_packed.tobytes()
        assert absmax.tobytes() == expected_absmax.tobytes()


@st.composite
def awkward_weights(draw: st.DrawFn) -> NDArray[np.float32]:
    """Draw up to 200 finite float32 weights: any values, and thresholds times an absmax or one step from them."""
    scale = np.float32(draw(st.floats(width=32, min_value=0, max_value=F32_LARGEST)))
    near = st.builds(
        lambda i, step: float(
            np.nextafter(NF4_THRESHOLDS[i] * scale, np.float32(step)) if step else NF4_THRESHOLDS[i] * scale
        ),
        st.integers(0, 14),
        st.sampled_from([0.0, F32_LARGEST, -F32_LARGEST]),
    )
    anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
    special = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, float(scale), -float(scale), F16_LARGEST])
    return np.array(draw(st.lists(st.one_of(near, special, anything), min_size=1, max_size=200)), np.float32)


@pytest.mark.parametrize("name", RUNNABLE)
@STEADY
@given(values=awkward_weights(), float_format=st.sampled_from(FORMATS), block_size=st.sampled_from(nf4.BLOCK_SIZES))
def test_encode_equals_the_reference_on_awkward_weights(
    name: Instructions, values: NDArray[np.float32], float_format: FloatFormat, block_size: int
) -> None:
    limit = np.float32(F16_LARGEST if float_format is FloatFormat.F16 else 3.3e38)
    raw = narrow(np.tile(np.clip(values, -limit, limit), 3), float_format)
    packed = np.empty(nf4.packed_nbytes(raw.size), np.uint8)
    absmax = np.empty(nf4.block_count(raw.size, block_size), np.float32)
    assert blocks.encode_into(raw, float_format, block_size=block_size, packed=packed, absmax=absmax, encoder=name)
    expected_packed, expected_absmax = nf4.encode(widen(raw, float_format), block_size=block_size)
    assert packed.tobytes() == expected_packed.tobytes()
    assert absmax.tobytes() == expected_absmax.tobytes()


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("float_format", FORMATS)
def test_a_non_finite_weight_is_reported_at_every_position(
    float_format: FloatFormat, bad: float, name: Instructions
) -> None:
    n = 64 * 4 + 37
    packed, absmax = np.empty(nf4.packed_nbytes(n), np.uint8), np.empty(nf4.block_count(n, 64), np.float32)
    largest = np.float32(F16_LARGEST if float_format is FloatFormat.F16 else 3.3e38)
    for position in range(n):
        values = np.full(n, largest, np.float32)
        values[position] = bad
        raw = narrow(values, float_format)
        assert not blocks.encode_into(raw, float_format, block_size=64, packed=packed, absmax=absmax, encoder=name)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("float_format", FORMATS)
def test_encoding_in_chunks_gives_the_bytes_of_encoding_at_once(float_format: FloatFormat, name: Instructions) -> None:
    raw = weights(256 * 37 + 11, float_format)
    packed, absmax = nf4.encode(widen(raw, float_format), block_size=256)
    for chunk in (256, 512, 256 * 9):
        codes, scales = np.empty_like(packed), np.empty_like(absmax)
        for start in range(0, raw.size, chunk):
            part = raw[start : start + chunk]
            blocks.encode_into(
                part,
                float_format,
                block_size=256,
                packed=codes[start // 2 :][: nf4.packed_nbytes(part.size)],
                absmax=scales[start // 256 :][: nf4.block_count(part.size, 256)],
                encoder=name,
            )
        assert codes.tobytes() == packed.tobytes()
        assert scales.tobytes() == absmax.tobytes()


def test_concurrent_encoding_in_threads_gives_the_same_bytes() -> None:
    raws = [weights(64 * 5000, FloatFormat.BF16, seed=seed) for seed in range(6)]

    def encode(raw: Raw) -> tuple[bytes, bytes]:
        packed, absmax = np.empty(raw.size // 2, np.uint8), np.empty(raw.size // 64, np.float32)
        assert blocks.encode_into(raw, FloatFormat.BF16, block_size=64, packed=packed, absmax=absmax)
        return packed.tobytes(), absmax.tobytes()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(encode, raws)) == [encode(raw) for raw in raws]
