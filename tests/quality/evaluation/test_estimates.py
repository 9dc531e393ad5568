"""Means and standard errors, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qformat.quality.evaluation.estimates import Estimate, estimate


def test_the_standard_error_is_that_of_the_windows_means() -> None:
    # Means of the windows: 2, 4, 9. Their mean is 5, their variance ((-3)^2 + (-1)^2 + 4^2) / 2 = 13.
    got = estimate(np.array([[1.0, 3.0], [4.0, 4.0], [8.0, 10.0]]))
    assert got.mean == 5
    assert got.standard_error == pytest.approx(math.sqrt(13 / 3))


def test_paired_values_have_the_error_of_their_differences() -> None:
    easy_and_hard = np.array([[1.0, 1.0], [9.0, 9.0]])
    assert estimate(easy_and_hard + 0.5).standard_error == pytest.approx(4)
    assert estimate((easy_and_hard + 0.5) - easy_and_hard) == Estimate(0.5, 0.0)


def test_agreement_is_a_share() -> None:
    assert estimate(np.array([[True, False], [True, True]])) == Estimate(0.75, 0.25)


def test_one_window_has_no_standard_error() -> None:
    assert estimate(np.array([[1.0, 2.0]])) == Estimate(1.5, None)
    assert Estimate(1.5, None).exponential() == Estimate(math.exp(1.5), None)
    assert Estimate(1.5, None).to_json() == {"mean": 1.5, "standard_error": None}


def test_a_perplexity_has_the_error_of_its_slope() -> None:
    assert Estimate(2.0, 0.1).exponential() == Estimate(math.exp(2), pytest.approx(0.1 * math.exp(2)))


def test_json_has_six_digits() -> None:
    assert Estimate(1 / 3, 2 / 30000).to_json() == {"mean": 0.333333, "standard_error": 6.66667e-05}
