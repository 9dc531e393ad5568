"""Error sums and counts of codes are correct at every size, and errors are None if a value is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qformat.codec.cpu.error_sums import ErrorSums, RunningErrors, add_up, count_codes
from qformat.codec.floats import FloatFormat, narrow, widen


@pytest.mark.parametrize("n_elements", [0, 1, 2, 7, 8, 9, 61])
def test_the_padding_of_an_odd_tensor_is_not_counted_as_a_code(n_elements: int) -> None:
    codes = np.arange(n_elements) * 5 % 16
    even = np.append(codes, 7) if n_elements % 2 else codes
    packed = (even[0::2] << 4 | even[1::2]).astype(np.uint8)
    assert count_codes(packed, n_elements=n_elements).tolist() == np.bincount(codes, minlength=16).tolist()


@pytest.mark.parametrize("float_format", list(FloatFormat))
@pytest.mark.parametrize("n_weights", [0, 1, 63, 64, 65, 4095, 4096, 4097, 10007])
def test_sums_are_correct_at_every_size(float_format: FloatFormat, n_weights: int) -> None:
    random = np.random.default_rng(n_weights)
    weights = narrow(random.normal(0, 1, n_weights).astype(np.float32), float_format)
    decoded = narrow(random.normal(0, 1, n_weights).astype(np.float32), float_format)
    running = RunningErrors(float_format)
    running.add(weights, decoded)
    sums = running.sums()
    w, q = (widen(raw, float_format).astype(np.float64) for raw in (weights, decoded))
    assert sums.n_weights == n_weights
    expected = [math.fsum(values) for values in (w * w, q * q, w * q, (w - q) ** 2)]
    found = [sums.weights_squared, sums.decoded_squared, sums.products, sums.errors_squared]
    assert found == pytest.approx(expected, rel=1e-13, abs=1e-12)
    assert sums.largest_error == pytest.approx(np.abs(w - q).max(initial=0), rel=1e-7)


@pytest.mark.parametrize("float_format", list(FloatFormat))
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 5000])
@pytest.mark.parametrize("side", ["weights", "decoded"])
def test_non_finite_values_have_no_errors(float_format: FloatFormat, bad: float, at: int, side: str) -> None:
    values = np.ones(5001, np.float32)
    changed = values.copy()
    changed[at] = bad
    fine, broken = narrow(values, float_format), narrow(changed, float_format)
    running = RunningErrors(float_format)
    running.add(*(fine, broken) if side == "decoded" else (broken, fine))
    sums = running.sums()
    assert not sums.finite
    assert (sums.relative_rms, sums.snr_db, sums.cosine, sums.max_abs_error) == (None, None, None, None)
    assert add_up([sums]) == ErrorSums()


def test_extreme_float16_values_widen_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    finite = every[(every & 0x7C00) != 0x7C00]
    zeros = np.zeros(finite.size, np.uint16)
    running = RunningErrors(FloatFormat.F16)
    running.add(finite, zeros)
    assert running.sums().weights_squared == pytest.approx(math.fsum(finite.view(np.float16).astype(float) ** 2))


def test_weights_without_error_have_no_signal_to_noise_ratio() -> None:
    same = np.ones(10, np.float32)
    running = RunningErrors(FloatFormat.F32)
    running.add(same, same)
    sums = running.sums()
    assert (sums.relative_rms, sums.snr_db, sums.cosine, sums.max_abs_error) == (0.0, None, 1.0, 0.0)
