"""The codec on CPUs: the reference's bits at every size, in given memory only, from parts and from threads."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qformat.codec import nested, nf4
from qformat.codec.codebooks import DYNAMIC_MAP, DYNAMIC_THRESHOLDS, NF4_THRESHOLDS
from qformat.codec.cpu import blocks, kernels, lanes
from qformat.codec.cpu.blocks import Instructions
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.errors import UsageError

STEADY = settings(deadline=None)  # a first example may compile, and test machines stall
FORMATS = list(FloatFormat)
RUNNABLE: list[Instructions] = [
    *(name for name, needed in lanes.NEEDED_FEATURES.items() if needed <= lanes.cpu_features()),
    "plain",
]
GUARD = 0xA5
F16_LARGEST = 65504.0
F32_LARGEST = float(np.finfo(np.float32).max)


def sizes_around(block_size: int) -> list[int]:
    return sorted({0, 1, 2, 31, 37, 63, 65, block_size - 1, block_size, block_size + 1, 3 * block_size, 1009, 1024})


def weights(n: int, float_format: FloatFormat, *, seed: int = 0) -> Raw:
    """n raw weights among which whole blocks are zero, negative zeros and subnormals occur."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(n, np.float32) * np.float32(0.02)
    values[generator.random(n) < 0.05] = -0.0
    values[generator.random(n) < 0.05] = 1e-41
    values[(np.arange(n) // 32 % 7) == 2] = 0
    return narrow(values, float_format)


class Guarded:
    """Memory for an array, at an address that is no multiple of its item size, between bytes that must stay."""

    def __init__(self, size: int, dtype: np.dtype[np.generic] | type) -> None:
        nbytes = size * np.dtype(dtype).itemsize
        self._memory = np.full(65 + nbytes + 64, GUARD, np.uint8)
        self._nbytes = nbytes
        self.array = self._memory[65 : 65 + nbytes].view(dtype)

    def tobytes(self) -> bytes:
        assert (self._memory[:65] == GUARD).all()
        assert (self._memory[65 + self._nbytes :] == GUARD).all()
        return self.array.tobytes()


def as_mapped(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """A read-only, unaligned copy: what a view of a mapped file may look like."""
    copy = Guarded(array.size, array.dtype).array
    copy[:] = array
    copy.setflags(write=False)
    return copy


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("float_format", FORMATS)
def test_encode_equals_the_reference_at_every_size_and_writes_nothing_else(
    float_format: FloatFormat, block_size: int, name: Instructions
) -> None:
    for n in sizes_around(block_size):
        raw = weights(n, float_format, seed=n)
        packed = Guarded(nf4.packed_nbytes(n), np.uint8)
        absmax = Guarded(nf4.block_count(n, block_size), np.float32)
        assert blocks.encode_into(
            as_mapped(raw), float_format, block_size=block_size, packed=packed.array, absmax=absmax.array, encoder=name
        )  # fmt: skip
        expected_packed, expected_absmax = nf4.encode(widen(raw, float_format), block_size=block_size)
        assert packed.tobytes() == expected_packed.tobytes()
        assert absmax.tobytes() == expected_absmax.tobytes()


@st.composite
def awkward_weights(draw: st.DrawFn) -> NDArray[np.float32]:
    """Up to 200 finite float32 weights: anything, and thresholds times some absmax or one step beside them."""
    scale = np.float32(draw(st.floats(width=32, min_value=0, max_value=F32_LARGEST)))
    near = st.builds(
        lambda i, step: float(
            np.nextafter(NF4_THRESHOLDS[i] * scale, np.float32(step)) if step else NF4_THRESHOLDS[i] * scale
        ),
        st.integers(0, 14),
        st.sampled_from([0.0, F32_LARGEST, -F32_LARGEST]),
    )
    anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
    special = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, float(scale), -float(scale), F16_LARGEST])
    return np.array(draw(st.lists(st.one_of(near, special, anything), min_size=1, max_size=200)), np.float32)


@pytest.mark.parametrize("name", RUNNABLE)
@STEADY
@given(values=awkward_weights(), float_format=st.sampled_from(FORMATS), block_size=st.sampled_from(nf4.BLOCK_SIZES))
def test_encode_equals_the_reference_on_awkward_weights(
    name: Instructions, values: NDArray[np.float32], float_format: FloatFormat, block_size: int
) -> None:
    limit = np.float32(F16_LARGEST if float_format is FloatFormat.F16 else 3.3e38)
    raw = narrow(np.tile(np.clip(values, -limit, limit), 3), float_format)
    packed = np.empty(nf4.packed_nbytes(raw.size), np.uint8)
    absmax = np.empty(nf4.block_count(raw.size, block_size), np.float32)
    assert blocks.encode_into(raw, float_format, block_size=block_size, packed=packed, absmax=absmax, encoder=name)
    expected_packed, expected_absmax = nf4.encode(widen(raw, float_format), block_size=block_size)
    assert packed.tobytes() == expected_packed.tobytes()
    assert absmax.tobytes() == expected_absmax.tobytes()


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("float_format", FORMATS)
def test_a_weight_that_is_not_finite_is_reported_wherever_it_stands(
    float_format: FloatFormat, bad: float, name: Instructions
) -> None:
    n = 64 * 4 + 37
    packed, absmax = np.empty(nf4.packed_nbytes(n), np.uint8), np.empty(nf4.block_count(n, 64), np.float32)
    largest = np.float32(F16_LARGEST if float_format is FloatFormat.F16 else 3.3e38)
    for position in range(n):
        values = np.full(n, largest, np.float32)
        values[position] = bad
        raw = narrow(values, float_format)
        assert not blocks.encode_into(raw, float_format, block_size=64, packed=packed, absmax=absmax, encoder=name)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("float_format", FORMATS)
def test_encoding_chunk_by_chunk_gives_the_bytes_of_the_whole(float_format: FloatFormat, name: Instructions) -> None:
    raw = weights(256 * 37 + 11, float_format)
    packed, absmax = nf4.encode(widen(raw, float_format), block_size=256)
    for chunk in (256, 512, 256 * 9):
        codes, scales = np.empty_like(packed), np.empty_like(absmax)
        for start in range(0, raw.size, chunk):
            part = raw[start : start + chunk]
            blocks.encode_into(
                part,
                float_format,
                block_size=256,
                packed=codes[start // 2 :][: nf4.packed_nbytes(part.size)],
                absmax=scales[start // 256 :][: nf4.block_count(part.size, 256)],
                encoder=name,
            )
        assert codes.tobytes() == packed.tobytes()
        assert scales.tobytes() == absmax.tobytes()


def double_quantized(n: int, block_size: int, *, seed: int = 0) -> tuple[NDArray[np.uint8], nested.NestedAbsmax]:
    """Random packed codes and a second level, in which negative scales occur."""
    generator = np.random.default_rng(seed)
    packed = generator.integers(0, 256, nf4.packed_nbytes(n), dtype=np.uint8)
    n_blocks = nf4.block_count(n, block_size)
    codes = generator.integers(0, 256, n_blocks, dtype=np.uint8)
    scales = generator.random(nf4.block_count(n_blocks, NESTED_BLOCK_SIZE), np.float32) * np.float32(0.3)
    return packed, nested.NestedAbsmax(codes, scales, np.float32(0.0831))


def decoded_by_reference(
    packed: NDArray[np.uint8], second: nested.NestedAbsmax, n: int, block_size: int, float_format: FloatFormat
) -> Raw:
    absmax = nested.decode_absmax(second.codes, second.nested_absmax, second.offset)
    return narrow(nf4.decode(packed, absmax, n_elements=n, block_size=block_size), float_format)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("float_format", FORMATS)
def test_decode_equals_the_reference_at_every_size_and_writes_nothing_else(
    float_format: FloatFormat, block_size: int, name: Instructions
) -> None:
    for n in sizes_around(block_size):
        packed, second = double_quantized(n, block_size, seed=n)
        expected = decoded_by_reference(packed, second, n, block_size, float_format).tobytes()
        scales = nested.decode_absmax(second.codes, second.nested_absmax, second.offset)
        out, from_nested = Guarded(n, float_format.raw_dtype), Guarded(n, float_format.raw_dtype)
        blocks.decode_into(
            as_mapped(packed), as_mapped(scales),
            n_elements=n, block_size=block_size, float_format=float_format, out=out.array, decoder=name,
        )  # fmt: skip
        blocks.decode_nested_into(
            as_mapped(packed), as_mapped(second.codes), as_mapped(second.nested_absmax), second.offset,
            n_elements=n, block_size=block_size, float_format=float_format, out=from_nested.array, decoder=name,
        )  # fmt: skip
        assert out.tobytes() == expected
        assert from_nested.tobytes() == expected


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_any_range_of_blocks_decodes_to_that_part_of_the_tensor(block_size: int) -> None:
    n_blocks = 64 * NESTED_BLOCK_SIZE + 777  # more scales than one pass holds
    n = n_blocks * block_size - 5
    packed, second = double_quantized(n, block_size)
    whole = decoded_by_reference(packed, second, n, block_size, FloatFormat.BF16)
    for first, last in [(0, n_blocks), (1, n_blocks), (255, 257), (256, 512), (300, 300), (511, 20_000), (17, 18)]:
        if last > n_blocks:
            continue
        part = slice(first * block_size, min(last * block_size, n))
        out = np.empty(part.stop - part.start, np.uint16)
        blocks.decode_nested_into(
            packed[part.start // 2 : nf4.packed_nbytes(part.stop)],
            second.codes[first:last], second.nested_absmax, second.offset,
            n_elements=out.size, block_size=block_size, float_format=FloatFormat.BF16, out=out, first_block=first,
        )  # fmt: skip
        assert np.array_equal(out, whole[part])


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_any_number_of_workers_gives_the_same_bytes(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALLEST_SHARE", 1000)
    n = 64 * 1009 + 3
    packed, second = double_quantized(n, 64)
    scales = nested.decode_absmax(second.codes, second.nested_absmax, second.offset)
    expected = decoded_by_reference(packed, second, n, 64, FloatFormat.BF16)
    out, from_nested = np.empty(n, np.uint16), np.empty(n, np.uint16)
    common = {"n_elements": n, "block_size": 64, "float_format": FloatFormat.BF16, "workers": workers}
    blocks.decode_into(packed, scales, out=out, **common)  # type: ignore[arg-type]
    blocks.decode_nested_into(packed, second.codes, second.nested_absmax, second.offset, out=from_nested, **common)  # type: ignore[arg-type]
    assert np.array_equal(out, expected)
    assert np.array_equal(from_nested, expected)


def test_workers_serve_a_forked_child_too() -> None:
    """A child has its parent's pool without the threads: taking it would wait for ever."""
    script = """
import os, numpy as np
from qformat.codec.cpu import blocks
from qformat.codec.floats import FloatFormat
blocks.SMALLEST_SHARE = 1000
def decode():
    out = np.empty(8192, np.float32)
    blocks.decode_into(np.zeros(4096, np.uint8), np.ones(128, np.float32), n_elements=8192, block_size=64,
                    float_format=FloatFormat.F32, out=out, workers=2)
    assert (out == -1).all()
decode()
child = os.fork()
decode()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


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
    assert not np.array_equal(out, fused)  # the data would show a fused multiply-add


@pytest.mark.parametrize("first_block", [0, 1, 255, 256, 300])
def test_scales_of_a_part_use_the_groups_of_the_tensor(first_block: int) -> None:
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
    """Values around the mean 1, one of them at distance 1, the rest at a threshold's distance or a step beside it."""
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
            expected[largest == 0] = 0  # 1e-42 vanishes beside 0.5
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


def test_threads_that_encode_at_once_do_not_disturb_each_other() -> None:
    raws = [weights(64 * 5000, FloatFormat.BF16, seed=seed) for seed in range(6)]

    def encode(raw: Raw) -> tuple[bytes, bytes]:
        packed, absmax = np.empty(raw.size // 2, np.uint8), np.empty(raw.size // 64, np.float32)
        assert blocks.encode_into(raw, FloatFormat.BF16, block_size=64, packed=packed, absmax=absmax)
        return packed.tobytes(), absmax.tobytes()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(encode, raws)) == [encode(raw) for raw in raws]


PACKED, SCALES, OUT = np.zeros(64, np.uint8), np.ones(2, np.float32), np.empty(128, np.uint16)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "too few codes": (lambda: decode(PACKED[1:], SCALES, OUT), r"packed: .*shape \(63,\), expected .*uint8 \[64\]"),
    "too few scales": (lambda: decode(PACKED, SCALES[1:], OUT), r"scales: .*expected .*float32 \[2\]"),
    "float64 scales": (lambda: decode(PACKED, SCALES.astype(np.float64), OUT), "scales: .*float64"),
    "a short buffer": (lambda: decode(PACKED, SCALES, OUT[1:]), "out: .*expected"),
    "a float32 buffer for bf16": (lambda: decode(PACKED, SCALES, OUT.astype(np.float32)), "out: .*float32.*expected"),
    "a strided buffer": (lambda: decode(PACKED, SCALES, np.empty(256, np.uint16)[::2]), "out: strided"),
    "a matrix": (lambda: decode(PACKED.reshape(8, 8), SCALES, OUT), "packed: "),
    "block size 48": (lambda: decode(PACKED, SCALES, OUT, block_size=48), "block size 48: must be one of"),
    "no such group": (lambda: decode_nested(first_block=255), "blocks 255 to 257"),
    "a negative block": (lambda: decode_nested(first_block=-1), "blocks -1 to 1"),
    "a short map": (lambda: decode_nested(nested_quant_map=DYNAMIC_MAP[:255]), "nested_quant_map"),
    "a short code buffer": (
        lambda: blocks.encode_into(OUT, FloatFormat.BF16, block_size=64, packed=PACKED[1:], absmax=SCALES),
        "packed: ",
    ),
    "fp32 weights called bf16": (
        lambda: blocks.encode_into(SCALES, FloatFormat.BF16, block_size=64, packed=PACKED[:1], absmax=SCALES[:1]),
        "raw: ",
    ),
}  # fmt: skip


def decode(packed: NDArray[np.uint8], scales: NDArray[np.float32], out: Raw, *, block_size: int = 64) -> None:
    blocks.decode_into(packed, scales, n_elements=128, block_size=block_size, float_format=FloatFormat.BF16, out=out)


def decode_nested(*, first_block: int = 0, nested_quant_map: NDArray[np.float32] = DYNAMIC_MAP) -> None:
    blocks.decode_nested_into(
        PACKED, PACKED[:2], SCALES[:1], np.float32(0),
        n_elements=128, block_size=64, float_format=FloatFormat.BF16, out=OUT,
        nested_quant_map=nested_quant_map, first_block=first_block,
    )  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_do_not_fit_are_refused_by_name(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        call()


def test_warming_up_tells_of_a_compilation_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for float_format in FORMATS:
        blocks.warm_up(float_format)
        blocks.warm_up(float_format, on_compile=lambda: told.append("compiled"))
    assert not told
    monkeypatch.setattr(blocks, "COMPILING_TAKES_S", 0.0)
    slow = kernels.add_in_order
    monkeypatch.setattr(type(slow), "compile", lambda kernel: time.sleep(0.2))
    blocks.warm_up(FloatFormat.BF16, on_compile=lambda: told.append("compiled"))
    assert told == ["compiled"]
