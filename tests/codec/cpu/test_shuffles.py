"""All instructions of this CPU are bit-identical to the reference for all codes, weights and magnitudes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qformat.codec import nf4
from qformat.codec.codebooks import NF4_THRESHOLDS
from qformat.codec.cpu import blocks, lanes, shuffles
from qformat.codec.cpu.blocks import Instructions
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.errors import UsageError
from tests.codec.cpu.sample_blocks import FORMATS, RUNNABLE

ALL_BYTES = np.arange(256, dtype=np.uint8)
LARGEST = np.float32(np.finfo(np.float32).max)


def scales_of_all_magnitudes() -> NDArray[np.float32]:
    """Return both signs of every float32 exponent with random fractions, and the ends of the range."""
    fractions = np.random.default_rng(5).integers(0, 1 << 23, (4, 255), dtype=np.uint32)
    positive = ((np.arange(255, dtype=np.uint32) << np.uint32(23)) | fractions).view(np.float32).reshape(-1)
    ends = np.array([0.0, 1e-45, 1.1754944e-38, 65504, 65519.996, 65520, LARGEST], np.float32)
    return np.concatenate([positive, ends, -positive, -ends])


def decode(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    block_size: int,
    float_format: FloatFormat,
    name: Instructions,
) -> Raw:
    out = np.empty(packed.size * 2, float_format.raw_dtype)
    blocks.decode_into(
        packed, scales, n_elements=out.size, block_size=block_size, float_format=float_format, out=out, decoder=name
    )
    return out


def reference(
    packed: NDArray[np.uint8], scales: NDArray[np.float32], block_size: int, float_format: FloatFormat
) -> Raw:
    return narrow(nf4.decode(packed, scales, n_elements=packed.size * 2, block_size=block_size), float_format)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("float_format", FORMATS)
def test_every_byte_decodes_at_every_magnitude(float_format: FloatFormat, block_size: int, name: Instructions) -> None:
    scales = np.repeat(scales_of_all_magnitudes(), 512 // block_size)
    packed = np.tile(ALL_BYTES, scales.size * block_size // 512)
    assert decode(packed, scales, block_size, float_format, name).tobytes() == (
        reference(packed, scales, block_size, float_format).tobytes()
    )


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("float_format", FORMATS)
def test_non_finite_scales_decode_as_in_the_reference(float_format: FloatFormat, name: Instructions) -> None:
    scales = np.array([np.inf, -np.inf, np.nan, np.uint32(0x7FFFFFFF).view(np.float32)], np.float32)
    packed = np.tile(ALL_BYTES, 2)
    with np.errstate(invalid="ignore"):
        expected = widen(reference(packed, scales, 256, float_format), float_format)
    assert np.array_equal(
        widen(decode(packed, scales, 256, float_format, name), float_format), expected, equal_nan=True
    )


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_every_bfloat16_encodes_correctly_with_many_scales(block_size: int, name: Instructions) -> None:
    finite = np.concatenate([np.arange(0x7F80), np.arange(0x8000, 0xFF80)]).astype(np.uint16)
    for largest in (0x0001, 0x007F, 0x0080, 0x3C97, 0x3F80, 0x477F, 0x7F7F):
        weights = finite[(finite & 0x7FFF) <= largest]
        blocks = np.full((-(-weights.size // (block_size - 1)), block_size), largest, np.uint16)
        blocks[:, 1:] = np.resize(weights, (blocks.shape[0], block_size - 1))
        assert_encodes_as_reference(blocks.reshape(-1), FloatFormat.BF16, block_size, name)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_every_float16_encodes_correctly_with_many_scales(block_size: int, name: Instructions) -> None:
    finite = np.concatenate([np.arange(0x7C00), np.arange(0x8000, 0xFC00)]).astype(np.uint16)
    for largest in (0x0001, 0x03FF, 0x0400, 0x2A66, 0x3C00, 0x7BFF):
        weights = finite[(finite & 0x7FFF) <= largest]
        blocks = np.full((-(-weights.size // (block_size - 1)), block_size), largest, np.uint16)
        blocks[:, 1:] = np.resize(weights, (blocks.shape[0], block_size - 1))
        assert_encodes_as_reference(blocks.reshape(-1), FloatFormat.F16, block_size, name)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("float_format", FORMATS)
def test_weights_around_every_threshold_encode_correctly_at_every_magnitude(
    float_format: FloatFormat, name: Instructions
) -> None:
    magnitudes = np.abs(scales_of_all_magnitudes())
    magnitudes = magnitudes[magnitudes <= (65504 if float_format is FloatFormat.F16 else LARGEST)]
    magnitudes = widen(narrow(magnitudes, float_format), float_format)
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    on = (NF4_THRESHOLDS[None, :] * magnitudes[:, None]).astype(np.float32)  # [scales, 15]
    raw_on = narrow(on.reshape(-1), float_format).reshape(on.shape)
    integers = raw_on.view(np.uint32 if float_format is FloatFormat.F32 else np.uint16)
    around = np.concatenate([integers - 1, integers, integers + 1, integers], axis=1)
    blocks = np.concatenate([around, around[:, :4]], axis=1).view(float_format.raw_dtype)  # [scales, 64]
    blocks[:, -1] = narrow(magnitudes, float_format)
    too_large = ~(np.abs(widen(blocks, float_format)) <= magnitudes[:, None])  # one step below zero or past the end
    blocks[too_large] = 0
    assert_encodes_as_reference(blocks.reshape(-1), float_format, 64, name)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_dense_sweep_of_float32_encodes_as_in_the_reference(name: Instructions) -> None:
    weights = np.linspace(-1, 1, 1 << 21, dtype=np.float32)
    weights[::64] = 1
    assert_encodes_as_reference(weights, FloatFormat.F32, 64, name)


def assert_encodes_as_reference(raw: Raw, float_format: FloatFormat, block_size: int, name: Instructions) -> None:
    packed = np.empty(nf4.packed_nbytes(raw.size), np.uint8)
    absmax = np.empty(nf4.block_count(raw.size, block_size), np.float32)
    assert blocks.encode_into(raw, float_format, block_size=block_size, packed=packed, absmax=absmax, encoder=name)
    expected_packed, expected_absmax = nf4.encode(widen(raw, float_format), block_size=block_size)
    assert absmax.tobytes() == expected_absmax.tobytes()
    assert packed.tobytes() == expected_packed.tobytes()


def test_the_estimate_is_the_code_or_one_less_with_a_margin_for_rounding() -> None:
    thresholds = NF4_THRESHOLDS.astype(np.float64)
    assert np.abs(np.polyval(shuffles.GUESS, thresholds) - np.arange(15)).max() < 0.21
    scaled = np.union1d(np.linspace(-1.0001, 1.0001, 2_000_001), thresholds)
    guess = np.polyval(shuffles.GUESS, scaled)
    code = np.searchsorted(thresholds, scaled, side="left")
    for room in (-0.25, 0.25):
        at_most_one_less = code - np.rint(guess + room)
        assert np.isin(at_most_one_less, (0, 1)).all()
    assert np.rint(guess).min() == 0
    assert np.rint(guess).max() == 14


@pytest.mark.parametrize("name", lanes.NEEDED_FEATURES)
def test_forcing_instructions_that_the_cpu_lacks_raises_an_error(
    name: Instructions, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = sorted(lanes.NEEDED_FEATURES[name])[0]  # type: ignore[index]
    features = lanes.NEEDED_FEATURES[name] - {lacking}  # type: ignore[index]
    monkeypatch.setattr(lanes, "cpu_features", lambda: features)
    with pytest.raises(UsageError, match=f"{name}.*this CPU lacks {lacking}"):
        decode(ALL_BYTES, np.ones(2, np.float32), 256, FloatFormat.BF16, name)
    with pytest.raises(UsageError, match=f"{name}.*this CPU lacks {lacking}"):
        assert_encodes_as_reference(np.ones(64, np.float32), FloatFormat.F32, 64, name)


def test_unknown_instructions_raise_an_error() -> None:
    with pytest.raises(UsageError, match="'neon': must be one of avx512, avx2, plain"):
        decode(ALL_BYTES, np.ones(2, np.float32), 256, FloatFormat.BF16, "neon")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512f", "avx512bw", "avx2", "fma", "f16c"}, "avx512"),
        ({"avx512f", "avx2", "fma", "f16c"}, "avx2"),
        ({"avx2", "fma"}, "plain"),
        ({"neon"}, "plain"),
    ],
)
def test_the_best_instructions_of_a_cpu_are_chosen(
    features: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "cpu_features", lambda: frozenset(features))
    blocks.decoder_name.cache_clear()
    try:
        assert blocks.decoder_name() == expected
    finally:
        blocks.decoder_name.cache_clear()


def test_this_cpu_uses_the_first_instructions_that_it_has() -> None:
    assert blocks.decoder_name() == RUNNABLE[0]


def test_a_second_process_finds_the_machine_code_in_the_cache(tmp_path: Path) -> None:
    script = (
        "from qformat.codec.cpu import blocks\n"
        "from qformat.codec.floats import FloatFormat\n"
        "blocks.warm_up(FloatFormat.BF16)\n"
    )

    def run() -> dict[str, int]:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")}

    compiled = run()
    assert len(compiled) >= 6  # an index and the code of at least three kernels
    assert run() == compiled
