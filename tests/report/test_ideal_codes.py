"""The expected shares of codes: against the codec itself on random weights, and by symmetry."""

from __future__ import annotations

import numpy as np
import pytest

from qformat.codec import nf4
from qformat.report.ideal_codes import expected_shares, gaussian_code_shares


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_expected_shares_are_those_of_encoded_normal_weights(block_size: int) -> None:
    weights = np.random.default_rng(block_size).standard_normal(2**21).astype(np.float32)
    packed, _ = nf4.encode(weights, block_size=block_size)
    found = np.bincount(nf4.unpack(packed, n_elements=weights.size), minlength=16) / weights.size
    five_deviations = 5 * np.sqrt(found / weights.size)
    assert (np.abs(gaussian_code_shares(block_size) - found) < five_deviations).all()


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_expected_shares_sum_to_one(block_size: int) -> None:
    assert gaussian_code_shares(block_size).sum() == pytest.approx(1, abs=1e-12)


def test_mixed_block_sizes_weigh_by_their_weights() -> None:
    mixed = expected_shares({64: 300, 128: 100})
    assert mixed == pytest.approx(0.75 * gaussian_code_shares(64) + 0.25 * gaussian_code_shares(128))


def test_no_weights_have_no_shares() -> None:
    assert expected_shares({}).tolist() == [0.0] * 16
