"""The second level on CPUs: scales are bit-identical to the reference, and sums are in index order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qformat.codec import nested, nf4
from qformat.codec.codebooks import DYNAMIC_MAP, DYNAMIC_THRESHOLDS
from qformat.codec.cpu import blocks
from qformat.codec.nested import NESTED_BLOCK_SIZE
from tests.codec.cpu.sample_blocks import STEADY, Guarded, as_mapped, double_quantized


def test_scales_are_a_product_and_a_sum_each_rounded() -> None:
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 256, 100_003, dtype=np.uint8)
    scales = generator.random(391, np.float32)
    offset = np.float32(0.0831)
    out = np.empty(codes.size, np.float32)
    blocks.decode_scales_into(codes, scales, DYNAMIC_MAP, offset, out)
    product = DYNAMIC_MAP[codes] * np.repeat(scales, 256)[: codes.size]
    fused = (DYNAMIC_MAP[codes].astype(np.float64) * np.repeat(scales, 256)[: codes.size] + offset).astype(np.float32)
    assert out.tobytes() == (product + offset).tobytes()
    assert not np.array_equal(out, fused)  # the data can reveal a fused multiply-add


@pytest.mark.parametrize("first_block", [0, 1, 255, 256, 300])
def test_scales_of_a_part_use_the_groups_of_the_entire_tensor(first_block: int) -> None:
    _, second = double_quantized(64 * 1009, 64)
    whole = nested.decode_absmax(second.codes, second.nested_absmax, second.offset)
    out = Guarded(1009 - first_block, np.float32)
    blocks.decode_scales_into(
        second.codes[first_block:], second.nested_absmax, DYNAMIC_MAP, second.offset, out.array, first_block=first_block
    )
    assert out.tobytes() == whole[first_block:].tobytes()


@STEADY
@given(
    st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=600),
    st.floats(0, 1, width=32),
)
def test_encode_absmax_equals_the_reference(numbers: list[float], share: float) -> None:
    absmax = np.array(numbers, np.float32)
    absmax[absmax > np.float32(share)] *= np.float32(share)
    assert_absmax_encodes_as_reference(absmax)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 511, 1009])
def test_encode_absmax_equals_the_reference_at_every_size(n: int) -> None:
    assert_absmax_encodes_as_reference(np.random.default_rng(n).random(n, np.float32))
    assert_absmax_encodes_as_reference(np.full(n, 0.25, np.float32))
    assert_absmax_encodes_as_reference(np.zeros(n, np.float32))


def test_encode_absmax_equals_the_reference_around_every_threshold() -> None:
    """Values around the mean 1: one at distance 1, the others at the distance of a threshold or one step from it."""
    points = np.concatenate([DYNAMIC_THRESHOLDS, DYNAMIC_MAP])
    around = np.concatenate([points, np.nextafter(points, np.float32(2)), np.nextafter(points, np.float32(-2))])
    for offset in (np.float32(0), np.float32(0.5)):
        for scale in (np.float32(1), np.float32(0.3), np.float32(7e-3), np.float32(1e-42)):
            groups = np.resize(around * scale, (-(-around.size // 255), 255))
            absmax = np.column_stack([groups, np.full(groups.shape[0], scale)]).astype(np.float32).reshape(-1) + offset
            codes, largest = encode_absmax(absmax, offset)
            centered = (absmax - offset).reshape(-1, 256)
            assert np.array_equal(largest, np.abs(centered).max(axis=1))
            divisor = np.where(largest == 0, np.float32(1), largest)[:, None]
            expected = np.searchsorted(DYNAMIC_THRESHOLDS, centered / divisor, side="left")
            expected[largest == 0] = 0  # 1e-42 vanishes next to 0.5
            assert np.array_equal(codes, expected.reshape(-1))


def encode_absmax(absmax: NDArray[np.float32], offset: np.float32) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    codes = Guarded(absmax.size, np.uint8)
    largest = Guarded(nf4.block_count(absmax.size, NESTED_BLOCK_SIZE), np.float32)
    blocks.encode_absmax_into(as_mapped(absmax), offset, codes=codes.array, nested_absmax=largest.array)
    codes.tobytes(), largest.tobytes()
    return codes.array, largest.array


def assert_absmax_encodes_as_reference(absmax: NDArray[np.float32]) -> None:
    expected = nested.encode_absmax(absmax)
    codes, largest = encode_absmax(absmax, expected.offset)
    assert codes.tobytes() == expected.codes.tobytes()
    assert largest.tobytes() == expected.nested_absmax.tobytes()


def test_sums_are_added_in_index_order_chunk_by_chunk() -> None:
    values = np.array([1e8, 1.0, 1e-8] * 333, np.float32)
    expected = 0.0
    for value in values.tolist():
        expected += value
    total = 0.0
    for start in range(0, values.size, 100):
        total = blocks.add_in_order(values[start : start + 100], total)
    assert total == expected
