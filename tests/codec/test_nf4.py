"""The NF4 reference agrees with bitsandbytes: the same codes, absmax values and decoded weights."""

from __future__ import annotations

import bitsandbytes.functional as F
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qformat.codec import nf4
from qformat.codec.codebooks import NF4_CODEBOOK, NF4_THRESHOLDS
from qformat.codec.floats import FloatFormat, narrow, widen

STEADY = settings(deadline=None)  # the first example may compile, and test machines stall
DTYPES = {
    FloatFormat.BF16: torch.bfloat16,
    FloatFormat.F16: torch.float16,
    FloatFormat.F32: torch.float32,
}
SIZES = (1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1009, 4096, 4 * 4099)
ZERO_TAIL_OF_BITSANDBYTES = np.float32(1e-38)


def weights(n: int, *, seed: int) -> torch.Tensor:
    """Return n Gaussian weights; every fifth block of 32 is zero, with both signs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 0.02
    values[(torch.arange(n) // 32 % 5) == 3] *= 0.0
    return values


def values_of(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.float().numpy()


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("float_format", DTYPES)
def test_codes_are_those_of_bitsandbytes(float_format: FloatFormat, n: int, block_size: int) -> None:
    tensor = weights(n, seed=n).to(DTYPES[float_format])
    theirs, state = F.quantize_4bit(tensor, blocksize=block_size, quant_type="nf4")
    packed, absmax = nf4.encode(values_of(tensor), block_size=block_size)
    assert packed.tobytes() == theirs.numpy().tobytes()
    if (
        absmax[-1] == 0 and n % block_size
    ):  # bitsandbytes raises the absmax of a partial block of zeros; the decoded zeros are the same
        assert state.absmax[-1] == ZERO_TAIL_OF_BITSANDBYTES
        state.absmax[-1] = 0
    assert absmax.tobytes() == state.absmax.float().numpy().tobytes()


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("float_format", DTYPES)
def test_decoded_weights_are_those_of_bitsandbytes(float_format: FloatFormat, block_size: int) -> None:
    # Rows are complete blocks. Otherwise bitsandbytes 0.50.2 uses wrong scales for a matrix on AVX-512 CPUs.
    tensor = weights(24 * 768, seed=2).reshape(24, 768).to(DTYPES[float_format])
    theirs, state = F.quantize_4bit(tensor, blocksize=block_size, quant_type="nf4")
    decoded = F.dequantize_4bit(theirs, state)
    ours = narrow(
        nf4.decode(theirs.numpy().reshape(-1), state.absmax.numpy(), n_elements=tensor.numel(), block_size=block_size),
        float_format,
    )
    assert decoded.dtype == DTYPES[float_format]
    assert np.array_equal(widen(ours, float_format).reshape(tensor.shape), values_of(decoded))


def test_no_weights_give_no_codes_and_no_blocks() -> None:
    packed, absmax = nf4.encode(np.empty(0, np.float32), block_size=64)
    assert packed.size == absmax.size == 0
    assert nf4.decode(packed, absmax, n_elements=0, block_size=64).size == 0


def test_zero_blocks_decode_to_zeros() -> None:
    packed, absmax = nf4.encode(np.array([0.0, -0.0] * 40, np.float32), block_size=64)
    assert packed.tobytes() == b"\x77" * 40
    assert absmax.tolist() == [0.0, 0.0]
    assert not nf4.decode(packed, absmax, n_elements=80, block_size=64).any()


def test_the_first_of_a_pair_is_in_the_high_nibble() -> None:
    packed, _ = nf4.encode(np.array([1.0, -1.0], np.float32), block_size=32)
    assert packed.tolist() == [0xF0]


def test_an_odd_last_code_is_paired_with_that_of_zero() -> None:
    packed, _ = nf4.encode(np.array([-1.0], np.float32), block_size=32)
    assert packed.tolist() == [0x07]


def test_a_weight_on_a_threshold_gets_the_lower_code() -> None:
    block = np.zeros(32, np.float32)
    block[0], block[1:16] = 1, NF4_THRESHOLDS
    block[16:31] = np.nextafter(NF4_THRESHOLDS, np.float32(2))
    codes = nf4.unpack(nf4.encode(block, block_size=32)[0], n_elements=32)
    assert codes[1:16].tolist() == list(range(15))
    assert codes[16:31].tolist() == list(range(1, 16))


def test_complete_blocks_multiply_and_a_partial_block_divides() -> None:
    absmax, weight = np.float32(0.9), NF4_THRESHOLDS[9] * np.float32(0.9)
    candidates = weight.view(np.uint32) + np.arange(-8, 8).astype(np.uint32)
    candidates = candidates.view(np.float32)
    block = np.concatenate([[absmax], candidates, np.zeros(15, np.float32)]).astype(np.float32)
    whole = nf4.unpack(nf4.encode(block, block_size=32)[0], n_elements=32)
    partial = nf4.unpack(nf4.encode(block[:31], block_size=32)[0], n_elements=31)
    assert np.array_equal(whole[1:17], NF4_THRESHOLDS.searchsorted(candidates * (np.float32(1) / absmax)))
    assert np.array_equal(partial[1:17], NF4_THRESHOLDS.searchsorted(candidates / absmax))


def test_blocks_of_subnormal_weights_keep_their_absmax() -> None:
    smallest = np.full(33, 1e-45, np.float32)
    packed, absmax = nf4.encode(smallest, block_size=32)
    assert absmax.tolist() == smallest[:2].tolist()
    assert packed.tobytes() == b"\x77" * 17


@STEADY
@given(st.lists(st.integers(0, 15), max_size=70))
def test_unpack_undoes_pack(codes: list[int]) -> None:
    packed = nf4.pack(np.array(codes, np.uint8))
    assert packed.size == nf4.packed_nbytes(len(codes))
    assert nf4.unpack(packed, n_elements=len(codes)).tolist() == codes


@STEADY
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=130),
    st.sampled_from(nf4.BLOCK_SIZES),
)
def test_decoded_weights_are_the_nearest_values_of_their_block(numbers: list[float], block_size: int) -> None:
    values = np.array(numbers, np.float32)
    packed, absmax = nf4.encode(values, block_size=block_size)
    scale = np.repeat(absmax, block_size)[: values.size].astype(np.float64)
    decoded = NF4_CODEBOOK[nf4.unpack(packed, n_elements=values.size)].astype(np.float64) * scale
    best = np.abs(NF4_CODEBOOK.astype(np.float64)[:, None] * scale - values).min(axis=0)
    slack = 4e-7 * scale + np.float64(nf4.SMALLEST_DIVISOR)
    assert (np.abs(decoded - values) <= best + slack).all()
