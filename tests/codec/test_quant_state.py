"""The quant_state record: its bytes are those of bitsandbytes, and the parser rejects everything else."""

from __future__ import annotations

import json
import math

import bitsandbytes.functional as F
import numpy as np
import pytest
import torch
from bitsandbytes.utils import unpack_tensor_to_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.codec.quant_state import ALIGNMENT, MAX_NBYTES, QuantState, padded_nbytes, parse
from qformat.errors import ArtifactError, Reason

STEADY = settings(deadline=None)  # the first example may compile, and test machines stall
DTYPES = {
    FloatFormat.BF16: torch.bfloat16,
    FloatFormat.F16: torch.float16,
    FloatFormat.F32: torch.float32,
}
SHAPES = [(1, 64), (3, 5), (576, 1536), (7,), (2, 3, 64), (4096, 11)]
RECORD = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "bfloat16",
    "shape": [4, 64],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.125,
}
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("float_format", DTYPES)
def test_json_is_what_bitsandbytes_writes(
    float_format: FloatFormat, block_size: int, shape: tuple[int, ...], double_quant: bool
) -> None:
    weight = torch.linspace(-0.02, 0.03, math.prod(shape)).reshape(shape).to(DTYPES[float_format])
    _, theirs = F.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant)
    written = theirs.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].numpy().tobytes()
    state = QuantState(block_size, float_format, shape, theirs.offset.item() if double_quant else None)
    assert state.to_json() == written
    assert parse(written, path="file", tensor="w") == state


def test_bitsandbytes_reads_the_padded_record() -> None:
    state = QuantState(64, FloatFormat.BF16, (4, 64), 0.125)
    read = unpack_tensor_to_dict(torch.from_numpy(np.frombuffer(state.to_padded_json(), np.uint8).copy()))
    assert read == RECORD


@STEADY
@given(FLOAT32, st.sampled_from(list(FloatFormat)), st.lists(st.integers(0, 10**9), max_size=4))
def test_padded_size_does_not_depend_on_the_offset(offset: float, float_format: FloatFormat, sizes: list[int]) -> None:
    state = QuantState(64, float_format, tuple(sizes), offset)
    size = padded_nbytes(block_size=64, float_format=float_format, shape=tuple(sizes), double_quant=True)
    padded = state.to_padded_json()
    assert len(padded) == size
    assert size % ALIGNMENT == 0
    assert padded.rstrip(b" ") == state.to_json()


@STEADY
@given(
    st.one_of(st.none(), FLOAT32),
    st.sampled_from(list(FloatFormat)),
    st.sampled_from(BLOCK_SIZES),
    st.lists(st.integers(0, 10**12), max_size=5),
)
def test_parse_undoes_writing(
    offset: float | None, float_format: FloatFormat, block_size: int, sizes: list[int]
) -> None:
    state = QuantState(block_size, float_format, tuple(sizes), offset)
    assert parse(state.to_padded_json(), path="file", tensor="w") == state


def test_a_bfloat16_second_level_is_accepted() -> None:
    data = json.dumps(RECORD | {"nested_dtype": "bfloat16"}).encode()
    assert parse(data, path="file", tensor="w").nested_dtype == "bfloat16"


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in RECORD.items() if name != key}


REFUSED_FIELDS: dict[str, tuple[object, str]] = {
    "a list": ([RECORD], "quant_state"),
    **{f"no {key}": (without(key), key) for key in RECORD},
    "an unknown key": (RECORD | {"zero_point": 0}, "zero_point"),
    "fp4": (RECORD | {"quant_type": "fp4"}, "quant_type"),
    "block size 63": (RECORD | {"blocksize": 63}, "blocksize"),
    "block size 512": (RECORD | {"blocksize": 512}, "blocksize"),
    "block size 64.0": (RECORD | {"blocksize": 64.0}, "blocksize"),
    "block size true": (RECORD | {"blocksize": True}, "blocksize"),
    "block size as text": (RECORD | {"blocksize": "64"}, "blocksize"),
    "dtype float64": (RECORD | {"dtype": "float64"}, "dtype"),
    "dtype with its module": (RECORD | {"dtype": "torch.bfloat16"}, "dtype"),
    "dtype load": (RECORD | {"dtype": "load"}, "dtype"),
    "shape as a number": (RECORD | {"shape": 4}, "shape"),
    "negative size": (RECORD | {"shape": [-1, 64]}, "shape"),
    "fractional size": (RECORD | {"shape": [4.0, 64]}, "shape"),
    "size true": (RECORD | {"shape": [True, 64]}, "shape"),
    "nested block size 128": (RECORD | {"nested_blocksize": 128}, "nested_blocksize"),
    "nested block size 256.0": (RECORD | {"nested_blocksize": 256.0}, "nested_blocksize"),
    "nested dtype float16": (RECORD | {"nested_dtype": "float16"}, "nested_dtype"),
    "offset as text": (RECORD | {"nested_offset": "0.1"}, "nested_offset"),
    "offset null": (RECORD | {"nested_offset": None}, "nested_offset"),
    "offset true": (RECORD | {"nested_offset": True}, "nested_offset"),
    "offset past float32": (RECORD | {"nested_offset": 3.5e38}, "nested_offset"),
}


@pytest.mark.parametrize("case", REFUSED_FIELDS)
def test_parse_rejects_invalid_records_and_reports_the_field(case: str) -> None:
    record, field = REFUSED_FIELDS[case]
    with pytest.raises(ArtifactError) as caught:
        parse(json.dumps(record).encode(), path="shard.safetensors", tensor="h.0.q.weight")
    assert caught.value.reason is Reason.QUANT_STATE
    assert caught.value.field == field
    assert caught.value.tensor == "h.0.q.weight"
    assert "shard.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.JSON_SYNTAX),
        (b"{", Reason.JSON_SYNTAX),
        (b"\xff", Reason.JSON_SYNTAX),
        (json.dumps(RECORD).encode() + b"\0", Reason.JSON_SYNTAX),
        (json.dumps(RECORD | {"nested_offset": math.nan}).encode(), Reason.JSON_SYNTAX),
        (json.dumps(RECORD | {"nested_offset": math.inf}).encode(), Reason.JSON_SYNTAX),
        (json.dumps(RECORD).replace("0.125", "1e999").encode(), Reason.JSON_LIMIT),
        (json.dumps(RECORD)[:-1].encode() + b', "dtype": "float32"}', Reason.JSON_DUPLICATE_KEY),
        (json.dumps(RECORD | {"shape": [1] * MAX_NBYTES}).encode(), Reason.JSON_LIMIT),
    ],
)
def test_parse_rejects_texts_that_are_not_strict_json(data: bytes, reason: Reason) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse(data, path="file", tensor="w")
    assert caught.value.reason is reason


def test_the_largest_float32_is_accepted_as_an_offset_and_the_next_number_is_rejected() -> None:
    largest = float(np.finfo(np.float32).max)
    assert (
        parse(json.dumps(RECORD | {"nested_offset": largest}).encode(), path="f", tensor="w").nested_offset == largest
    )
    with pytest.raises(ArtifactError, match="is outside the range of float32"):
        parse(json.dumps(RECORD | {"nested_offset": math.nextafter(largest, math.inf)}).encode(), path="f", tensor="w")
