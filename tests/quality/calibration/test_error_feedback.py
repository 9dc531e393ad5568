"""Error feedback against a dense float64 reference that inverts the Hessian anew for every column."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from qformat.artifact.components import PackedShape
from qformat.artifact.packed_arrays import PackedArrays, encode_plain
from qformat.codec import nf4
from qformat.codec.codebooks import NF4_CODEBOOK
from qformat.codec.floats import FloatFormat
from qformat.quality.calibration.error_feedback import (
    SCALE_FACTORS,
    FeedbackSettings,
    encode_with_feedback,
    inverse_factor,
)

SETTINGS = FeedbackSettings()


def correlated_inputs(n_columns: int, *, n_rows: int = 1000, seed: int = 0) -> np.ndarray:
    """float64 [n_rows, n_columns]: a few directions carry most of it, as in a model."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(n_rows, n_columns // 8)) @ random.normal(size=(n_columns // 8, n_columns))
    return directions + 0.3 * random.normal(size=(n_rows, n_columns))


def some_weights(n_rows: int, n_columns: int, *, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, (n_rows, n_columns)).astype(np.float32)


def hessian_of(inputs: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((2 * inputs.T @ inputs / len(inputs)).astype(np.float32))


def feed_back(
    weights: np.ndarray, hessian: torch.Tensor, *, block_size: int = 64, double_quant: bool = False, workers: int = 2
) -> PackedArrays:
    factor = inverse_factor(hessian.clone(), damping=SETTINGS.damping)
    assert factor is not None
    layout = PackedShape(weights.shape, FloatFormat.F32, block_size, double_quant)
    return encode_with_feedback(weights, factor, layout=layout, settings=SETTINGS, workers=workers)


def by_dense_inverses(weights: np.ndarray, hessian: np.ndarray, scales: np.ndarray, block_size: int) -> np.ndarray:
    """Round column by column as Optimal Brain Surgeon says, in float64: the error of a column, divided by the diagonal
    of the inverse Hessian of the columns that are left, moves these along that inverse's row.
    """
    left = weights.astype(np.float64)
    damped = hessian.astype(np.float64) + 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
    rounded = np.zeros_like(left)
    for j in range(left.shape[1]):
        inverse = np.linalg.inv(damped[j:, j:])
        scale = scales[:, j // block_size]
        grid = NF4_CODEBOOK.astype(np.float64)[None, :] * scale[:, None]
        rounded[:, j] = np.take_along_axis(grid, np.abs(grid - left[:, j : j + 1]).argmin(1)[:, None], 1)[:, 0]
        left[:, j:] -= np.outer(left[:, j] - rounded[:, j], inverse[0] / inverse[0, 0])
    return rounded


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("double_quant", [False, True])
def test_codes_are_those_of_a_dense_reference_against_the_scales_that_are_decoded(
    block_size: int, double_quant: bool
) -> None:
    weights, hessian = some_weights(70, 128), hessian_of(correlated_inputs(128))
    encoded = feed_back(weights, hessian, block_size=block_size, double_quant=double_quant)
    scales = encoded.scales().reshape(70, -1).astype(np.float64)
    expected = by_dense_inverses(weights, hessian.numpy(), scales, block_size)
    found = encoded.decode()
    # A weight half-way between two codes may fall to either side in float32, and then moves its whole row.
    same = np.isclose(found, expected, rtol=1e-5, atol=1e-7).all(axis=1)
    assert same.mean() > 0.85
    inputs = correlated_inputs(128)
    errors = [np.square(inputs @ (q - weights).T).sum(0) for q in (found, expected)]
    assert np.allclose(errors[0].sum(), errors[1].sum(), rtol=0.02)


def test_with_the_identity_as_hessian_it_is_plain_rounding_against_the_chosen_scales() -> None:
    weights = some_weights(65, 192)
    encoded = feed_back(weights, torch.eye(192))
    scales = encoded.scales().reshape(65, 3, 1)
    scaled = weights.reshape(65, 3, 64) * (np.float32(1) / scales)
    codes = nf4.unpack(encoded.packed, n_elements=weights.size).reshape(65, 3, 64)
    nearest = np.abs(scaled[..., None] - NF4_CODEBOOK).argmin(-1)
    assert (codes == nearest).mean() > 0.9999  # a midpoint may be rounded either way
    # The scale is the best of the factors by squared error, which the identity does not weight.
    absmax = np.abs(weights.reshape(65, 3, 64)).max(-1)
    factors = np.array(SCALE_FACTORS, np.float32)
    errors = []
    for factor in factors:
        tried = (absmax * factor)[..., None]
        q = NF4_CODEBOOK[np.abs(weights.reshape(65, 3, 64)[..., None] / tried[..., None] - NF4_CODEBOOK).argmin(-1)]
        errors.append(np.square(q * tried - weights.reshape(65, 3, 64)).sum(-1))
    best = factors[np.argmin(errors, axis=0)]
    assert np.isclose(scales[..., 0] / absmax, best, rtol=1e-5).mean() > 0.99


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_error_of_the_outputs_is_less_than_half_of_plain_roundings(double_quant: bool) -> None:
    inputs, weights = correlated_inputs(256), some_weights(96, 256)
    layout = PackedShape(weights.shape, FloatFormat.F32, 64, double_quant)
    plain = np.asarray(encode_plain(weights.reshape(-1), layout).decode())
    ours = feed_back(weights, hessian_of(inputs), double_quant=double_quant).decode()
    error = [np.square(inputs @ (q - weights).T).sum() for q in (plain, ours)]
    assert error[1] < 0.5 * error[0]


def test_feedback_against_the_decoded_scales_beats_codes_that_were_chosen_for_the_exact_ones() -> None:
    inputs, weights = correlated_inputs(256), some_weights(96, 256)
    weights[:, :64] *= 0.2  # small scales: the second level, which has one offset for all, hits them hardest
    hessian = hessian_of(inputs)
    exact, second = (feed_back(weights, hessian, double_quant=double_quant) for double_quant in (False, True))
    mixed = dataclasses.replace(second, packed=exact.packed)
    error = [np.square(inputs @ (e.decode() - weights).T).sum() for e in (mixed, second)]
    assert error[1] < 0.97 * error[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(workers: int) -> None:
    weights, hessian = some_weights(300, 128), hessian_of(correlated_inputs(128))
    one, other = feed_back(weights, hessian, workers=2), feed_back(weights, hessian, workers=workers)
    assert np.array_equal(one.packed, other.packed)
    assert np.array_equal(one.scales(), other.scales())


def test_inputs_that_are_always_zero_round_plainly_and_disturb_nothing() -> None:
    inputs, weights = correlated_inputs(128), some_weights(64, 128)
    inputs[:, 5] = inputs[:, 77] = 0
    encoded = feed_back(weights, hessian_of(inputs))
    found = encoded.decode()
    scales = encoded.scales().reshape(64, 2)
    for column in (5, 77):
        grid = NF4_CODEBOOK[None, :] * scales[:, column // 64, None]
        assert np.allclose(found[:, column], np.take_along_axis(
            grid, np.abs(grid - weights[:, column : column + 1]).argmin(1)[:, None], 1)[:, 0])  # fmt: skip
    without = np.delete(np.arange(128), [5, 77])
    errors = np.square(inputs[:, without] @ (found - weights)[:, without].T).sum()
    assert errors < 0.5 * np.square(inputs @ (0.1 * weights).T).sum()


def test_blocks_of_zeros_and_scales_that_decode_to_less_than_zero_are_finite() -> None:
    weights = some_weights(256, 128)
    weights[3], weights[4, :64], weights[:, 64:] = 0, 1e-30, weights[:, 64:] * 50
    encoded = feed_back(weights, hessian_of(correlated_inputs(128)), double_quant=True)
    assert (encoded.scales() <= 0).any()
    assert np.isfinite(encoded.decode()).all()


@pytest.mark.parametrize("diagonal", [0.0, float("nan"), float("inf")])
def test_a_hessian_of_nothing_or_of_no_numbers_has_no_factor(diagonal: float) -> None:
    hessian = torch.zeros(64, 64)
    hessian.diagonal().fill_(diagonal)
    assert inverse_factor(hessian, damping=0.01) is None


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    hessian = hessian_of(correlated_inputs(96))
    factor = inverse_factor(hessian.clone(), damping=0.01)
    assert factor is not None
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.double().T @ factor.double() @ damped, torch.eye(96).double(), atol=1e-3)
