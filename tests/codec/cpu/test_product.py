"""The product on CPUs: its weights are bit-identical to the decoder, and its sums agree with float64."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qformat.codec.cpu import lanes
from qformat.codec.cpu.blocks import decode_into, decode_nested_into
from qformat.codec.cpu.product import Product, Team, best_instructions, unsupported
from qformat.codec.cpu.product_rows import NEEDED_FEATURES, ProductInstructions
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import UsageError


def runnable() -> Iterator[tuple[ProductInstructions, FloatFormat]]:
    for name in get_args(ProductInstructions):
        if NEEDED_FEATURES[name] <= lanes.cpu_features():
            yield from ((name, each) for each in FloatFormat if name != "bf16" or each is FloatFormat.BF16)


RUNNABLE = list(runnable())

NEEDS_A_PRODUCT = pytest.mark.skipif(not RUNNABLE, reason="this CPU has neither AVX2 nor AVX-512, and so no product")


class Weight:
    """Random weight with its product and its decoded values."""

    def __init__(
        self, n: int, k: int, block_size: int, name: ProductInstructions | None, float_format: FloatFormat,
        *, double_quant: bool = True,
    ) -> None:  # fmt: skip
        random = np.random.default_rng([n, k, block_size])
        n_blocks = n * k // block_size
        packed = random.integers(0, 256, n * k // 2, dtype=np.uint8)
        decoded = np.empty(n * k, float_format.raw_dtype)
        absmax: NDArray[np.uint8] | NDArray[np.float32]
        if double_quant:
            absmax = random.integers(0, 256, n_blocks, dtype=np.uint8)
            nested: NDArray[np.float32] | None = (random.random(-(-n_blocks // 256)) * 0.05).astype(np.float32)
            assert nested is not None
            decode_nested_into(
                packed, absmax, nested, np.float32(0.04), n_elements=n * k, block_size=block_size,
                float_format=float_format, out=decoded,
            )  # fmt: skip
        else:
            absmax, nested = random.standard_normal(n_blocks).astype(np.float32), None
            decode_into(packed, absmax, n_elements=n * k, block_size=block_size, float_format=float_format, out=decoded)
        self.float_format = float_format
        self.values = widen(decoded, float_format).reshape(n, k)
        self.product = Product(
            packed, absmax, nested, 0.04, shape=(n, k), block_size=block_size, float_format=float_format,
            instructions=name,
        )  # fmt: skip

    def times(self, x: NDArray[np.float32], *, team: Team | None = None) -> Raw:
        out = np.full(x.shape[0] * self.values.shape[0], 77, self.float_format.raw_dtype)
        self.product(narrow(x.reshape(-1), self.float_format), out, team=team, n_threads=3)
        return out.reshape(x.shape[0], -1)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("name", "float_format"), RUNNABLE)
def test_products_with_unit_vectors_return_every_weight_exactly(
    name: ProductInstructions, float_format: FloatFormat, block_size: int, double_quant: bool
) -> None:
    k = max(192, block_size) if block_size <= 64 else 2 * block_size
    weight = Weight(7, k, block_size, name, float_format, double_quant=double_quant)
    read = widen(weight.times(np.eye(k, dtype=np.float32)).reshape(-1), float_format).reshape(k, 7)
    np.testing.assert_array_equal(read.T, weight.values)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize(("name", "float_format"), RUNNABLE)
def test_sums_stay_within_their_bound(name: ProductInstructions, float_format: FloatFormat, m: int) -> None:
    weight = Weight(65, 576, 64, name, float_format)
    raw = narrow(np.random.default_rng(m).standard_normal(m * 576).astype(np.float32), float_format)
    x = widen(raw, float_format).reshape(m, 576)
    found = widen(weight.times(x).reshape(-1), float_format).reshape(m, 65).astype(np.float64)
    exact = x.astype(np.float64) @ weight.values.T.astype(np.float64)
    magnitudes = np.abs(x).astype(np.float64) @ np.abs(weight.values.T).astype(np.float64)
    assert (np.abs(found - exact) <= bound_of_sums(576, float_format, exact, magnitudes)).all()


def bound_of_sums(
    n: int, float_format: FloatFormat, exact: NDArray[np.float64], magnitudes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the largest error of sums of n products, given the sums of the magnitudes of the products."""
    rounding = {FloatFormat.BF16: 2.0**-8, FloatFormat.F16: 2.0**-11, FloatFormat.F32: 0.0}[float_format]
    # n roundings of float32 in any order, one lost subnormal product each, and one rounding to the format.
    bound = n * (2.0**-23 * magnitudes + 2.0**-126)
    result: NDArray[np.float64] = bound + rounding * (np.abs(exact) + bound)
    return result


def three_threads(function: int, data: int, n_threads: int) -> bool:
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    assert n_threads == 3
    threads = [threading.Thread(target=call, args=(data,)) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return True


@pytest.mark.parametrize(("name", "float_format"), RUNNABLE)
def test_the_number_of_threads_changes_no_bit(name: ProductInstructions, float_format: FloatFormat) -> None:
    weight = Weight(2048, 1088, 64, name, float_format)  # 17 shares
    x = np.random.default_rng(0).standard_normal((3, 1088)).astype(np.float32)
    expected = weight.times(x)
    np.testing.assert_array_equal(weight.times(x, team=three_threads), expected)
    np.testing.assert_array_equal(weight.times(x, team=lambda *_: False), expected)


@NEEDS_A_PRODUCT
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40), groups=st.integers(1, 20), m=st.integers(1, 9), which=st.integers(0, len(RUNNABLE) - 1),
    small=st.booleans(),
)  # fmt: skip
def test_all_instructions_agree_with_a_sum_in_float64(n: int, groups: int, m: int, which: int, small: bool) -> None:
    name, float_format = RUNNABLE[which]
    weight = Weight(n, 64 * groups, 32 if small else 64, name, float_format)
    x = np.random.default_rng(n).integers(-2, 3, (m, 64 * groups)).astype(np.float32)
    found = widen(weight.times(x).reshape(-1), float_format).reshape(m, n)
    exact = x.astype(np.float64) @ weight.values.T.astype(np.float64)
    magnitudes = np.abs(x).astype(np.float64) @ np.abs(weight.values.T).astype(np.float64)
    assert (np.abs(found - exact) <= bound_of_sums(64 * groups, float_format, exact, magnitudes)).all()


@pytest.mark.parametrize(
    ("columns", "block_size", "reason"),
    [
        (576, 64, None),
        (96, 32, "not a multiple of 64"),
        (192, 128, "not a multiple of 128"),
        (0, 64, "not a multiple of 64"),
    ],
)
def test_an_unsupported_weight_has_a_reason(
    columns: int, block_size: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    best_instructions.cache_clear()
    monkeypatch.setattr(lanes, "cpu_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    try:
        found = unsupported(columns, block_size, FloatFormat.BF16)
    finally:
        best_instructions.cache_clear()
    assert found is None if reason is None else reason in str(found)


def test_a_cpu_without_vector_instructions_has_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    best_instructions.cache_clear()
    monkeypatch.setattr(lanes, "cpu_features", frozenset)
    try:
        assert "neither AVX2 nor AVX-512" in str(unsupported(64, 64, FloatFormat.BF16))
    finally:
        best_instructions.cache_clear()


def test_missing_instructions_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "cpu_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    with pytest.raises(UsageError, match="this CPU lacks avx512bf16, avx512bw, avx512f"):
        Product(
            np.zeros(32, np.uint8), np.zeros(1, np.float32), None, 0.0, shape=(1, 64), block_size=64,
            float_format=FloatFormat.BF16, instructions="bf16",
        )  # fmt: skip


def test_bf16_instructions_reject_other_formats() -> None:
    with pytest.raises(UsageError, match="they multiply bfloat16, not float16"):
        Weight(1, 64, 64, "bf16", FloatFormat.F16)


@NEEDS_A_PRODUCT
def test_arrays_of_the_wrong_size_or_dtype_are_rejected() -> None:
    weight = Weight(4, 64, 64, None, FloatFormat.BF16)
    x, out = np.zeros(64, np.uint16), np.zeros(4, np.uint16)
    with pytest.raises(UsageError, match="x: found uint16"):
        weight.product(x[:63], out)
    with pytest.raises(UsageError, match="x: found float32"):
        weight.product(x.astype(np.float32), out)
    with pytest.raises(UsageError, match="out: "):
        weight.product(x, out[:3])
    with pytest.raises(UsageError, match=r"packed: .*expected contiguous uint8 \[128\]"):
        Product(
            np.zeros(127, np.uint8), np.zeros(4, np.float32), None, 0.0, shape=(4, 64), block_size=64,
            float_format=FloatFormat.BF16,
        )  # fmt: skip
    with pytest.raises(UsageError, match="K must be a multiple of the block size 128 and of 64"):
        Product(
            np.zeros(128, np.uint8), np.zeros(2, np.float32), None, 0.0, shape=(4, 64), block_size=128,
            float_format=FloatFormat.BF16,
        )  # fmt: skip
