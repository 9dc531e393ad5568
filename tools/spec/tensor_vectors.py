"""The vectors of single tensors: bits of the input, exact bytes of each component, bits of the decoded values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qformat.artifact.packed_arrays import PackedArrays
from qformat.codec import nf4
from qformat.codec.codebooks import DYNAMIC_MAP, DYNAMIC_THRESHOLDS, NF4_CODEBOOK, NF4_THRESHOLDS
from qformat.codec.floats import FloatFormat, Raw
from qformat.codec.nested import encode_absmax
from qformat.codec.quant_state import QuantState
from tools.spec.reference_codec import (
    BF16,
    F16,
    F32,
    Floats,
    JsonObject,
    encode,
    neighbours,
    raw_of,
    reference_decode,
    stored,
)

F32_MAX = np.finfo(np.float32).max


class TensorVectors:
    """Collects vectors."""

    def __init__(self) -> None:
        self.vectors: list[JsonObject] = []

    def encode(
        self,
        name: str,
        about: str,
        rules: str,
        values: Any,
        *,
        dtype: FloatFormat = BF16,
        shape: Sequence[int] | None = None,
        block: int = 64,
        double: bool = True,
        decoded: Sequence[FloatFormat] = (BF16, F16, F32),
        raw: Raw | None = None,
    ) -> None:
        """Add a vector for encoders and decoders. `values` are rounded to the dtype unless `raw` has the bits."""
        raw = raw_of(values, dtype) if raw is None else raw
        shape = (1, raw.size) if shape is None else shape
        encoded = encode(raw, dtype, shape, block, double)
        self._add(name, about, rules, encoded, decoded, raw)

    def decode(
        self,
        name: str,
        about: str,
        rules: str,
        encoded: PackedArrays,
        decoded: Sequence[FloatFormat] = (BF16, F16, F32),
    ) -> None:
        """Add a vector for decoders only: valid codes that this encoder does not write."""
        self._add(name, about, rules, encoded, decoded, None)

    def refuse(self, name: str, about: str, rules: str, values: Any, *, dtype: FloatFormat, block: int = 64) -> None:
        """Add values that an encoder must reject."""
        raw = raw_of(values, dtype)
        self.vectors.append(
            {
                "name": name, "about": about, "rules": rules.split(), "dtype": dtype.value, "shape": [1, raw.size],
                "block_size": block, "double_quant": True, "input": raw.tobytes().hex(), "reason": "nonfinite_weight",
            }
        )  # fmt: skip

    def _add(
        self, name: str, about: str, rules: str, e: PackedArrays, decoded: Sequence[FloatFormat], raw: Raw | None
    ) -> None:
        vector: JsonObject = {
            "name": name, "about": about, "rules": rules.split(), "dtype": e.layout.float_format.value,
            "shape": list(e.layout.shape), "block_size": e.layout.block_size, "double_quant": e.layout.double_quant,
            "input": None if raw is None else raw.tobytes().hex(),
            "packed": e.packed.tobytes().hex(), "absmax": e.absmax.tobytes().hex(),
        }  # fmt: skip
        if e.nested_absmax is not None and e.nested_quant_map is not None:
            vector["nested_absmax"] = e.nested_absmax.tobytes().hex()
            if not np.array_equal(e.nested_quant_map, DYNAMIC_MAP):
                vector["nested_quant_map"] = e.nested_quant_map.tobytes().hex()
            assert e.state.nested_offset is not None
            vector["nested_offset_bits"] = f"{np.float32(e.state.nested_offset).view(np.uint32):08X}"
        vector["quant_state"] = e.state.to_padded_json().decode("ascii")
        vector["decoded"] = {f.value: reference_decode(e, f).tobytes().hex() for f in decoded}
        self.vectors.append(vector)


def tensor_vectors() -> list[JsonObject]:
    """Return the contents of tensors.json. One generator draws all numbers, so call order determines every byte."""
    v, rng = TensorVectors(), np.random.default_rng(20240229)
    add_codes(v, rng)
    add_shapes(v, rng)
    add_extremes(v, rng)
    add_second_level(v, rng)
    add_refused(v)
    add_for_decoders(v)
    return v.vectors


def add_codes(v: TensorVectors, rng: np.random.Generator) -> None:
    """Add every format and block size, and codes that depend on a tie, a product or a quotient."""
    for dtype in (BF16, F16, F32):
        for block in nf4.BLOCK_SIZES:
            v.encode(
                f"plain_{dtype.value.lower()}_{block}", f"normal weights in {dtype.value}, whole blocks of {block}",
                "E1 E3 E5 E6 E9 E11 N3 N4 N5 N7 N8 N9 F1", rng.normal(0, 0.02, (8, block)), dtype=dtype,
                shape=(8, block), block=block, double=block != 128,
            )  # fmt: skip
    ties = np.concatenate([neighbours(NF4_THRESHOLDS), NF4_CODEBOOK, [np.float32(-1), np.float32(1), np.float32(0)]])
    v.encode("ties_whole_block", "each threshold, one step below and above it, and each codebook value; absmax 1",
             "E1 E2 E6", ties, dtype=F32, block=64, double=False, shape=(4, 16))  # fmt: skip
    v.encode("ties_partial_block", "the same in one partial block, which divides", "E2 E7", ties, dtype=F32, block=256,
             double=False)  # fmt: skip
    differing = multiply_and_divide_differ(rng)
    v.encode("reciprocal_in_whole_block", "weights whose code depends on multiplying by the reciprocal", "E6",
             differing, dtype=F32, block=32, double=False)  # fmt: skip
    v.encode("division_in_partial_block", "the same weights in a partial block: other codes", "E7",
             differing, dtype=F32, block=64, double=False)  # fmt: skip


def add_shapes(v: TensorVectors, rng: np.random.Generator) -> None:
    """Add tails, rows that share blocks, and zeros."""
    for n, what in ((1, "one element"), (63, "a block minus one"), (65, "a block plus one"), (127, "a prime")):
        v.encode(f"odd_{n}", f"{what}: odd tail, partial block", "E7 E9 E10 E11", rng.normal(0, 0.02, n), shape=(n, 1))
    v.encode("one_negative", "one element, negative: code 0", "E2 E10", [-0.5], shape=(1, 1), double=False)
    v.encode("rows_across_blocks", "5 x 13: blocks run across rows", "E3 E7 E10", rng.normal(0, 1, (5, 13)),
             shape=(5, 13), block=32, dtype=F16)  # fmt: skip
    v.encode("zeros", "an all-zero tensor", "E8 N6", np.zeros(128), shape=(2, 64))
    v.encode("zero_block", "an all-zero block between others", "E8 N7",
             np.concatenate([rng.normal(0, 1, 64), np.zeros(64), rng.normal(0, 1, 64)]), shape=(3, 64))  # fmt: skip
    v.encode("zero_tail", "a partial block of zeros, odd", "E8 E10", np.append(rng.normal(0, 1, 64), np.zeros(7)))
    v.encode("negative_zero", "-0.0 has code 7 and decodes to +0.0", "E8", [-0.0, 0.0, 1.0, -1.0] * 16, double=False)


def add_extremes(v: TensorVectors, rng: np.random.Generator) -> None:
    """Add weights at both ends of the formats' ranges."""
    tiny16 = np.arange(64, dtype=np.uint16) * np.uint16(2) + np.uint16(1)
    v.encode("subnormal_bf16", "a block of bfloat16 subnormals: below 1e-38 the divisor is 1e-38", "E5 E6 F1", None,
             raw=np.where(np.arange(64) % 2, tiny16 | np.uint16(0x8000), tiny16), double=False)  # fmt: skip
    v.encode("subnormal_f16", "a block of binary16 subnormals", "F1 F2 E5", None,
             raw=np.where(np.arange(64) % 2, tiny16 * 8 | np.uint16(0x8000), tiny16 * 8).astype(np.uint16),
             dtype=F16)  # fmt: skip
    v.encode("around_smallest_divisor", "absmax just below, at and above 1e-38, one block each", "E5",
             np.concatenate([np.linspace(-m, m, 32) for m in neighbours(np.array([1e-38], np.float32))]),
             dtype=F32, block=32, double=False)  # fmt: skip
    for dtype, largest in ((BF16, 0x7F7F), (F16, 0x7BFF)):
        bits = np.where(np.arange(64) % 3 == 0, largest | 0x8000, largest).astype(np.uint16)
        bits[5:40] = raw_of(rng.normal(0, 1, 35) * (3e38 if dtype is BF16 else 6e4) / 4, dtype)
        v.encode(f"largest_{dtype.value.lower()}", f"the largest finite {dtype.value} of both signs", "E6 F3", None,
                 raw=bits, dtype=dtype, double=dtype is F16)  # fmt: skip
    v.encode("largest_f32", "the largest float32: its reciprocal is subnormal; rounding to 16 bits overflows",
             "E6 F3 N7", np.concatenate([np.linspace(-1, 1, 64) * F32_MAX, np.zeros(64)]), dtype=F32,
             shape=(2, 64))  # fmt: skip


def add_second_level(v: TensorVectors, rng: np.random.Generator) -> None:
    """Add several nested blocks, their mean and their ties."""
    scales = np.abs(rng.normal(0, 1, 513)) * np.where(np.arange(513) // 256 == 1, 100, 1) + 0.01
    weights = rng.normal(0, 0.3, (513, 32)).clip(-1, 1)
    weights[:, 3] = 1
    values = (weights * scales[:, None]).reshape(-1)[:-7]
    v.encode("three_nested_groups", "513 blocks: two whole nested groups and one of a single block", "N3 N4 N5 N7",
             values, shape=(1, values.size), block=32, decoded=(BF16,))  # fmt: skip
    v.encode("equal_scales", "two blocks with the same absmax: nested_absmax 0, every code 0", "N6 N7",
             [1.5, -0.25] * 64, shape=(2, 64))  # fmt: skip
    huge, half_ulp = 2.0**53, 2.0**29
    for name, order, what in (
        ("sum_in_index_order_1", (huge, 1.0, 1.0, half_ulp), "small values are lost behind a large one"),
        ("sum_in_index_order_2", (1.0, 1.0, huge, half_ulp), "the same values in another order: another mean"),
    ):
        blocks = np.zeros((4, 32))
        blocks[:, 0] = order
        v.encode(name, f"the mean's sum is float64 and in index order: {what}", "N3", blocks, shape=(4, 32), block=32)
    v.encode("second_level_ties", "scales whose normalised value is exactly a threshold of the dynamic map", "N5",
             second_level_ties(), dtype=F32, block=32, decoded=(F32,))  # fmt: skip


def add_refused(v: TensorVectors) -> None:
    """Add values that every encoder must reject."""
    v.refuse("nan_refused", "a NaN", "E4", [0.5, np.nan, 0.25], dtype=BF16)
    v.refuse("infinity_refused", "an infinity in a whole block", "E4", [1.0] * 63 + [-np.inf], dtype=F16)
    v.refuse(
        "nan_in_tail_refused", "a NaN as the last element of a partial block", "E4", [1.0] * 64 + [np.nan], dtype=F32
    )


def multiply_and_divide_differ(rng: np.random.Generator) -> Floats:
    """Return 32 weights with absmax 0.7, some with different codes for x * (1 / absmax) and x / absmax."""
    absmax = np.float32(0.7)
    found = [absmax]
    around = np.concatenate([neighbours(neighbours(NF4_THRESHOLDS * absmax)), neighbours(NF4_CODEBOOK * absmax)])
    product, quotient = around * (np.float32(1) / absmax), around / absmax
    differs = np.searchsorted(NF4_THRESHOLDS, product) != np.searchsorted(NF4_THRESHOLDS, quotient)
    found += list(np.unique(around[differs]))
    assert 2 <= len(found) <= 32, len(found)
    return np.array(found + list(rng.normal(0, 0.1, 32 - len(found))), np.float32)


def second_level_ties() -> Floats:
    """Return blocks whose absmax, centred and divided by the largest, equals thresholds of the dynamic map exactly.

    All numbers are integers below 2^24 and symmetric around the offset, so that only the division rounds.
    """
    thresholds = DYNAMIC_THRESHOLDS[DYNAMIC_THRESHOLDS > 0.1]

    def hits(largest: int) -> Floats:
        centered = np.rint(thresholds.astype(np.float64) * largest).astype(np.float32)
        found: Floats = centered[centered / np.float32(largest) == thresholds]
        return found

    largest = max(range(2**22 - 4000, 2**22), key=lambda candidate: len(hits(candidate)))
    ties = hits(largest)
    assert len(ties) >= 20, len(ties)
    steps = np.unique(np.concatenate([ties - 1, ties, ties + 1]))[:70]
    centered = np.concatenate([[np.float32(largest)], steps])
    absmax = np.float32(2**22) + np.stack([centered, -centered], axis=1).reshape(-1)
    assert encode_absmax(absmax).offset == 2**22
    blocks = np.zeros((absmax.size, 32), np.float32)
    blocks[np.arange(absmax.size), np.arange(absmax.size) % 32] = absmax
    return blocks.reshape(-1)


def add_for_decoders(v: TensorVectors) -> None:
    """Add valid codes and scales that this encoder does not write."""
    every_code = nf4.pack(np.arange(64, dtype=np.uint8) % 16)
    state = QuantState(32, BF16, (2, 32), 0.25)
    negative = stored(state, every_code, np.array([0, 127], np.uint8), np.array([1], np.float32), DYNAMIC_MAP)
    v.decode("negative_scale", "a decoded scale is negative: signs turn, zeros become -0.0", "E11 S12 N7", negative)
    other = stored(state, every_code, np.array([1, 255], np.uint8), np.array([-2], np.float32),
                    np.linspace(0.5, -3, 256).astype(np.float32))  # fmt: skip
    v.decode("other_nested_map", "a stored map that is not the dynamic one, and a negative nested_absmax", "N2", other)
    in_bfloat16 = stored(QuantState(32, BF16, (2, 32), 0.052978515625, "bfloat16"), every_code,
                          np.array([3, 250], np.uint8), np.array([0.017], np.float32), DYNAMIC_MAP)  # fmt: skip
    v.decode("nested_dtype_bfloat16", "as bitsandbytes writes it after a forward on some CPUs", "N11", in_bfloat16)
    not_float32 = stored(QuantState(32, BF16, (2, 32), 0.1), every_code, np.array([3, 250], np.uint8),
                          np.array([0.017], np.float32), DYNAMIC_MAP)  # fmt: skip
    v.decode("offset_rounded_to_float32", "an offset with more digits than a float32 has", "N7 N10", not_float32)
    bf16_ties = [
        0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0xBF818000, 0x00008000, 0x00018000, 0x7F7F8000,
        0x7F7F7FFF, 0xFF7F8000, 0x00000001, 0x3F7FFFFF,
    ]  # fmt: skip
    f16_ties = [
        0x3F801000, 0x3F803000, 0x3F801001, 0x3F800FFF, 0x477FF000, 0x477FEFFF, 0xC77FF000, 0x33000000, 0x33000001,
        0x33800000, 0x33C00000, 0x387FE000, 0x387FF000,
    ]  # fmt: skip
    scales = np.array(bf16_ties + f16_ties + [0] * 6, np.uint32).view(np.float32)
    codes = np.tile(np.array([15, 0, 7, 8], np.uint8), 256)
    rounding = stored(QuantState(32, F32, (1, 1024), None), nf4.pack(codes), scales)
    v.decode("rounding", "ties to even, gradual underflow, overflow: the scales are the values", "F2 F3 E11", rounding)
    products = stored(QuantState(32, F32, (1, 512), None),
                       nf4.pack(np.arange(512, dtype=np.uint8) % 16),
                       np.float32(2.0) ** np.array([-149, -140, -130, -126, -24, -14, -8, -1, 0, 3, 15, 16, 64, 126,
                                                    127, 127], np.float32) * np.float32(1))  # fmt: skip
    v.decode("products_of_every_code", "each codebook value times scales over the whole range", "E1 E11 F1", products)
    ignored = stored(QuantState(64, BF16, (1, 3), None),
                      np.array([0x0F, 0x8C], np.uint8), np.array([1], np.float32))  # fmt: skip
    v.decode("last_nibble_ignored", "an odd tensor whose unused nibble is not 7", "E10", ignored)
