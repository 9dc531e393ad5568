"""Conversions of the three formats agree with torch for every 16-bit pattern and every rounding boundary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qformat.codec.floats import FloatFormat, Raw, narrow, widen

SIXTEEN_BITS = [FloatFormat.BF16, FloatFormat.F16]
ALL_PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def torch_dtype(float_format: FloatFormat) -> torch.dtype:
    return {
        FloatFormat.BF16: torch.bfloat16,
        FloatFormat.F16: torch.float16,
        FloatFormat.F32: torch.float32,
    }[float_format]


def torch_values(raw: NDArray[np.uint16], float_format: FloatFormat) -> torch.Tensor:
    return torch.from_numpy(raw.view(np.int16)).view(torch_dtype(float_format))


def rounding_boundaries(float_format: FloatFormat) -> NDArray[np.float32]:
    """Return all values of a 16-bit format, the midpoints, and one float32 step around each, with both signs."""
    dropped = 16 if float_format is FloatFormat.BF16 else 13
    finite = widen(ALL_PATTERNS[: 0x7F80 if float_format is FloatFormat.BF16 else 0x7C00], float_format)
    half_way = (finite.astype(np.float64)[:-1] + finite[1:].astype(np.float64)) / 2
    beyond_the_last = finite.view(np.uint32)[-1:] + np.uint32(1 << (dropped - 1))
    points = np.concatenate([finite, half_way.astype(np.float32), beyond_the_last.view(np.float32)])
    around = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-1))])
    return np.concatenate([around, -around])


@pytest.mark.parametrize("float_format", SIXTEEN_BITS)
def test_all_16_bit_patterns_widen_as_in_torch(float_format: FloatFormat) -> None:
    ours = widen(ALL_PATTERNS, float_format)
    theirs = torch_values(ALL_PATTERNS, float_format).float().numpy()
    numbers = ~np.isnan(theirs)
    assert ours.dtype == np.float32
    assert np.array_equal(np.isnan(ours), ~numbers)
    assert np.array_equal(ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])


@pytest.mark.parametrize("float_format", SIXTEEN_BITS)
def test_all_16_bit_patterns_except_nans_survive_a_round_trip_through_float32(float_format: FloatFormat) -> None:
    wide = widen(ALL_PATTERNS, float_format)
    numbers = ~np.isnan(wide)
    assert np.array_equal(narrow(wide, float_format)[numbers], ALL_PATTERNS[numbers])


@pytest.mark.parametrize("float_format", SIXTEEN_BITS)
def test_narrow_rounds_every_boundary_as_torch_does(float_format: FloatFormat) -> None:
    values = rounding_boundaries(float_format)
    theirs = torch.from_numpy(values).to(torch_dtype(float_format)).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(narrow(values, float_format), theirs)


@pytest.mark.parametrize("float_format", SIXTEEN_BITS)
def test_narrow_rounds_random_bit_patterns_as_torch_does(float_format: FloatFormat) -> None:
    values = np.random.default_rng(1).integers(0, 1 << 32, 1_000_003, dtype=np.uint32).view(np.float32)
    theirs = torch.from_numpy(values).to(torch_dtype(float_format)).view(torch.int16).numpy().view(np.uint16)
    numbers = ~np.isnan(values)
    ours = narrow(values, float_format)
    assert np.array_equal(ours[numbers], theirs[numbers])
    assert np.isnan(widen(ours[~numbers], float_format)).all()


@pytest.mark.parametrize("float_format", SIXTEEN_BITS)
def test_narrow_overflows_to_infinity_and_keeps_nan(float_format: FloatFormat) -> None:
    values = np.array([3.4e38, -3.4e38, np.inf, -np.inf, np.nan], np.float32)
    assert np.array_equal(
        widen(narrow(values, float_format), float_format),
        np.array([np.inf, -np.inf, np.inf, -np.inf, np.nan], np.float32),
        equal_nan=True,
    )


def test_float32_is_returned_unmodified() -> None:
    values: Raw = np.array([-0.0, 1e-45, 3.4e38], np.float32)
    assert widen(values, FloatFormat.F32) is values
    assert narrow(values.astype(np.float32), FloatFormat.F32).tobytes() == values.tobytes()


@pytest.mark.parametrize("float_format", list(FloatFormat))
def test_names_and_sizes_agree_with_torch(float_format: FloatFormat) -> None:
    dtype = torch_dtype(float_format)
    assert f"torch.{float_format.torch_name}" == str(dtype)
    assert float_format.nbytes == dtype.itemsize == float_format.raw_dtype.itemsize
    assert FloatFormat.from_torch_name(float_format.torch_name) is float_format


def test_other_torch_names_are_rejected() -> None:
    with pytest.raises(KeyError):
        FloatFormat.from_torch_name("float64")
