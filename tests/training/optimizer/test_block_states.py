"""8-bit blocks of optimizer states against bitsandbytes' block-wise quantization."""

from __future__ import annotations

import bitsandbytes.functional as peer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat.training.optimizer.block_states import EncodingScratch, decode_blocks, encode_blocks
from qformat.training.optimizer.dynamic_map import HALF_STEP_SIGNED, HALF_STEP_UNSIGNED, dynamic_values


def round_trip(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks, uint8 [n, 260], of values, float32 [n, 256], and the decoded blocks."""
    n = values.shape[0]
    blocks = torch.zeros(n, 260, dtype=torch.uint8)
    scratch = EncodingScratch.take(torch.empty(EncodingScratch.nbytes(n), dtype=torch.uint8), n)
    encode_blocks(values, blocks, scratch, signed=signed)
    decoded = torch.empty(n, 256)
    decode_blocks(blocks, decoded, torch.empty(n, 256, dtype=torch.int32), signed=signed)
    return blocks, decoded


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_equals_that_of_bitsandbytes(signed: bool) -> None:
    assert torch.equal(dynamic_values(signed=signed), peer.create_dynamic_map(signed=signed).float())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_equal_those_of_bitsandbytes(signed: bool) -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    values = values if signed else values.square()
    code = peer.create_dynamic_map(signed=signed)
    expected, state = peer.quantize_blockwise(values, code=code, blocksize=256)
    blocks, decoded = round_trip(values, signed=signed)
    assert torch.equal(blocks[:, 256:].view(torch.float32).flatten(), state.absmax)
    same = blocks[:, :256] == expected.view(64, 256)
    theirs = peer.dequantize_blockwise(expected, state)
    # If the codes differ, the two chose different neighbours, and ours is never the farther one. The exception is our
    # rule that a positive second moment never becomes zero.
    apart = ~same & ~((theirs == 0) & (values > 0) & ~torch.tensor(signed))
    ours_off, theirs_off = (decoded - values).abs(), (theirs - values).abs()
    assert bool((ours_off <= theirs_off * (1 + 1e-5))[apart].all())


@pytest.mark.parametrize("signed", [True, False])
@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), spread=st.floats(0, 12))
def test_rounding_stays_within_half_a_step(signed: bool, seed: int, exponent: int, spread: float) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 256, generator=random) * torch.exp(-spread * torch.rand(3, 256, generator=random))
    values = (values if signed else values.abs()) * 10.0**exponent
    _, decoded = round_trip(values, signed=signed)
    bound = (HALF_STEP_SIGNED if signed else HALF_STEP_UNSIGNED) * (1 + 1e-4)
    assert bool(((decoded - values).abs() <= bound * values.abs().amax(1, keepdim=True)).all())


def test_zeros_stay_zeros_and_positive_second_moments_stay_positive() -> None:
    values = torch.zeros(2, 256)
    values[1] = 1e-12
    values[1, 0] = 1.0
    _, decoded = round_trip(values, signed=False)
    assert bool((decoded[0] == 0).all())
    assert bool((decoded[1] > 0).all())


def test_a_nan_affects_only_its_block() -> None:
    values = torch.ones(2, 256)
    values[0, 17] = torch.nan
    _, decoded = round_trip(values, signed=True)
    assert bool(decoded[0].isnan().any())
    assert torch.equal(decoded[1], torch.ones(256))
