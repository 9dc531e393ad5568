"""The kernels for ggml's blocks are bit-identical to the decoder of gguf-py on random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from qformat.codec.floats import FloatFormat, narrow
from qformat.codec.foreign.ggml_blocks import round_to_bf16
from qformat.codec.foreign.ggml_types import BLOCK_TYPES, UNREAD_TYPES


def test_the_table_is_that_of_ggml() -> None:
    for number, block_type in BLOCK_TYPES.items():
        peer = gguf.GGMLQuantizationType(number)
        assert block_type.name == peer.name
        assert (block_type.block_size, block_type.block_nbytes) == gguf.GGML_QUANT_SIZES[peer]


def test_the_types_that_are_not_read_have_their_names_in_ggml() -> None:
    names = {int(peer): peer.name for peer in gguf.GGMLQuantizationType}
    assert {number: block_type.name for number, block_type in BLOCK_TYPES.items()} | UNREAD_TYPES == names


@pytest.mark.parametrize("number", BLOCK_TYPES)
def test_random_blocks_decode_as_gguf_decodes_them(number: int) -> None:
    block_type = BLOCK_TYPES[number]
    data = np.random.default_rng(number).integers(0, 256, (64, 40 * block_type.block_nbytes), np.uint8)
    out = np.empty(64 * 40 * block_type.block_size, np.float32)
    block_type.decode(data.ravel(), out)
    with np.errstate(invalid="ignore", over="ignore"):
        stored = data.view({0: np.float32, 1: np.float16}.get(number, np.uint8))
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType(number)).ravel()
    nan = np.isnan(expected)
    assert not nan.all()
    assert np.array_equal(np.isnan(out), nan)
    assert np.array_equal(out[~nan].view(np.uint32), np.asarray(expected, np.float32)[~nan].view(np.uint32))


def test_rounding_is_that_of_the_codec() -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values[:4] = [np.inf, -np.inf, np.float32(3.4e38), -0.0]
    out = np.empty(values.size, np.uint16)
    round_to_bf16(values, out)
    assert np.array_equal(out, narrow(values, FloatFormat.BF16))
