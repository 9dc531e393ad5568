"""Error feedback against a dense float64 reference that inverts the Hessian anew for every column.

A weight half-way between two codes may fall to either side in float32, and then moves all columns after it. So the
reference follows our choices, and each of them must be the best one up to the rounding that led to it.
"""

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
from tests.rounding import rounding, sum_error

SETTINGS = FeedbackSettings()


def correlated_inputs(n_columns: int, *, n_rows: int = 1000, seed: int = 0) -> np.ndarray:
    """Return float64 [n_rows, n_columns] in which a few directions dominate, as in a model."""
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
    layout = PackedShape(weights.shape, FloatFormat.F32, block_size, double_quant)
    return encode_with_feedback(weights, factor_of(hessian), layout=layout, settings=SETTINGS, workers=workers)


def factor_of(hessian: torch.Tensor) -> torch.Tensor:
    factor = inverse_factor(hessian.clone(), damping=SETTINGS.damping)
    assert factor is not None
    return factor


def moved_by_dense_inverses(weights: np.ndarray, hessian: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """Return what each column [n, k] was when its turn came, as Optimal Brain Surgeon says, in float64: the error of a
    column, divided by the diagonal of the inverse Hessian of the columns that are left, moves these along that
    inverse's row.
    """
    left = weights.astype(np.float64)
    for j in range(left.shape[1]):
        inverse = np.linalg.inv(hessian[j:, j:])
        left[:, j + 1 :] -= np.outer(left[:, j] - rounded[:, j], inverse[0, 1:] / inverse[0, 0])
    return left


def rounding_of_moves(weights: np.ndarray, upper: np.ndarray, rounded: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Return how far float32 may be from the exact columns [n, k]."""
    errors = (moved - rounded) / upper.diagonal()
    sums = np.abs(weights) + np.abs(rounded) + np.abs(errors) @ np.abs(upper)
    carried = sums @ np.abs(np.linalg.inv(upper)) * np.abs(upper.diagonal())
    return sum_error(len(upper) + 4) * (carried + np.abs(moved) + np.abs(rounded))


def farther_than_nearest(wanted: np.ndarray, rounded: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return how much nearer the best code of the block is to the wanted value, [n, k]; 0 if it was chosen."""
    block_size = wanted.shape[1] // scales.shape[1]
    grid = NF4_CODEBOOK.astype(np.float64) * np.repeat(scales.astype(np.float64), block_size, axis=1)[..., None]
    return np.abs(wanted - rounded) - np.abs(wanted[..., None] - grid).min(-1)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("double_quant", [False, True])
def test_each_code_is_the_one_that_a_dense_reference_chooses_against_the_scale_that_is_decoded(
    block_size: int, double_quant: bool
) -> None:
    weights, hessian = some_weights(70, 128), hessian_of(correlated_inputs(128))
    encoded = feed_back(weights, hessian, block_size=block_size, double_quant=double_quant)
    rounded = encoded.decode().astype(np.float64)
    upper = factor_of(hessian).numpy().astype(np.float64)
    # The Hessian whose factor this is: how near it is to the damped one that was asked for is another test.
    moved = moved_by_dense_inverses(weights, np.linalg.inv(upper.T @ upper), rounded)
    off = rounding_of_moves(weights, upper, rounded, moved)
    farther = farther_than_nearest(moved, rounded, encoded.scales().reshape(70, -1))
    assert (farther <= 2 * off).all()  # it is the difference of two distances to the same moved weight
    # The bound can tell codes apart: it is below a tenth of the smallest distance between two of them.
    step = np.diff(NF4_CODEBOOK).min() * np.repeat(np.abs(encoded.scales()).reshape(70, -1), block_size, axis=1)
    assert (off < 0.1 * step).all()


def test_with_the_identity_as_hessian_it_is_plain_rounding_against_the_chosen_scales() -> None:
    weights = some_weights(65, 192)
    encoded = feed_back(weights, torch.eye(192))
    scales = encoded.scales().reshape(65, 3, 1)
    scaled = weights.reshape(65, 3, 64) * (np.float32(1) / scales)
    codes = nf4.unpack(encoded.packed, n_elements=weights.size).reshape(65, 3, 64)
    nearest = np.abs(scaled[..., None] - NF4_CODEBOOK).argmin(-1)
    # Near a midpoint the roundings of the scaled weight, at most 1, may decide: three here, as many there.
    farther = np.abs(scaled - NF4_CODEBOOK[codes]) - np.abs(scaled - NF4_CODEBOOK[nearest])
    assert (farther <= 6 * 2.0**-24).all()
    # The scale is the best of the factors by squared error, which the identity does not weight.
    absmax = np.abs(weights.reshape(65, 3, 64)).max(-1)
    factors = np.array(SCALE_FACTORS, np.float32)
    errors = []
    for factor in factors:
        tried = (absmax * factor)[..., None]
        q = NF4_CODEBOOK[np.abs(weights.reshape(65, 3, 64)[..., None] / tried[..., None] - NF4_CODEBOOK).argmin(-1)]
        errors.append(np.square(q * tried - weights.reshape(65, 3, 64)).sum(-1))
    tried = np.abs(factors[:, None, None] - scales[..., 0] / absmax)
    assert (tried.min(0) <= 2 * 2.0**-23).all()  # one of the factors, but for a product and a quotient
    chosen = np.take_along_axis(np.array(errors), tried.argmin(0)[None], 0)[0]
    # Either side's error is a sum of 64 squares of differences in float32; a difference is off by a rounding of its
    # terms, which are at most as large as the scale.
    off = sum_error(64) * chosen + 64 * 2 * 2.0**-23 * absmax * np.sqrt(chosen)
    assert (chosen <= np.min(errors, axis=0) + 2 * off).all()


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_outputs_come_nearer_than_by_plain_rounding_and_than_by_the_chosen_scales_alone(double_quant: bool) -> None:
    inputs, weights = correlated_inputs(256), some_weights(96, 256)
    layout = PackedShape(weights.shape, FloatFormat.F32, 64, double_quant)
    plain = np.asarray(encode_plain(weights.reshape(-1), layout).decode())
    encoded = feed_back(weights, hessian_of(inputs), double_quant=double_quant)
    scales = np.repeat(encoded.scales().reshape(96, -1), 64, axis=1)
    nearest = NF4_CODEBOOK[np.abs(weights[..., None] - NF4_CODEBOOK * scales[..., None]).argmin(-1)] * scales
    error = [np.square(inputs @ (q - weights).T).sum() for q in (encoded.decode(), nearest, plain)]
    assert error[0] < error[1]
    assert error[0] < error[2]


def test_feedback_against_the_decoded_scales_beats_codes_that_were_chosen_for_the_exact_ones() -> None:
    inputs, weights = correlated_inputs(256), some_weights(96, 256)
    weights[:, :64] *= 0.2  # small scales: the second level, which has one offset for all, hits them hardest
    hessian = hessian_of(inputs)
    exact, second = (feed_back(weights, hessian, double_quant=double_quant) for double_quant in (False, True))
    mixed = dataclasses.replace(second, packed=exact.packed)
    error = [np.square(inputs @ (e.decode() - weights).T).sum() for e in (mixed, second)]
    assert error[1] < error[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(workers: int) -> None:
    weights, hessian = some_weights(300, 128), hessian_of(correlated_inputs(128))
    one, other = feed_back(weights, hessian, workers=2), feed_back(weights, hessian, workers=workers)
    assert np.array_equal(one.packed, other.packed)
    assert np.array_equal(one.scales(), other.scales())


def test_inputs_that_are_always_zero_round_plainly_and_disturb_nothing() -> None:
    inputs, weights = correlated_inputs(128), some_weights(64, 128)
    inputs[:, [5, 77]] = 0
    encoded = feed_back(weights, hessian_of(inputs))
    found, scales = encoded.decode(), encoded.scales().reshape(64, 2)
    # Nothing moves these columns: what decides is the weight, after the roundings of the scaled weight and of a decoded
    # one, each at most as large as the scale.
    farther = farther_than_nearest(weights.astype(np.float64), found, scales)[:, [5, 77]]
    assert (farther <= 6 * rounding(torch.float32) * scales).all()
    plain = encode_plain(weights.reshape(-1), PackedShape(weights.shape, FloatFormat.F32, 64, False)).decode()
    error = [np.square(inputs @ (q - weights).T).sum() for q in (found, np.asarray(plain))]
    assert error[0] < error[1]


def test_blocks_of_zeros_and_scales_that_decode_to_less_than_zero_are_finite() -> None:
    weights = some_weights(256, 128)
    weights[3], weights[4, :64], weights[:, 64:] = 0, 1e-30, weights[:, 64:] * 50
    encoded = feed_back(weights, hessian_of(correlated_inputs(128)), double_quant=True)
    assert (encoded.scales() <= 0).any()
    assert np.isfinite(encoded.decode()).all()


@pytest.mark.parametrize("diagonal", [0.0, float("nan"), float("inf")])
def test_a_hessian_that_is_zero_or_not_finite_has_no_factor(diagonal: float) -> None:
    hessian = torch.zeros(64, 64)
    hessian.diagonal().fill_(diagonal)
    assert inverse_factor(hessian, damping=0.01) is None


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    hessian = hessian_of(correlated_inputs(96))
    factor = factor_of(hessian)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(96)
    assert torch.equal(factor, factor.triu())
    residual = factor.double().T @ factor.double() @ damped - torch.eye(96)
    # A factor, its inverse and another factor: each is off by sum_error(96) of what the condition makes of it (Higham,
    # sections 10.1 and 14.3), in the norm that takes columns for vectors.
    condition = float(torch.linalg.cond(damped))
    assert float(residual.norm()) <= 3 * sum_error(96) * condition
