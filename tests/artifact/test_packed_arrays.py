"""Packed weights in memory, complete and in runs of blocks, agree with the reference codec."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from qformat.artifact.components import Component, PackedShape
from qformat.artifact.packed_arrays import BlockScales, PackedArrays, encode_plain
from qformat.codec import nf4
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE, decode_absmax, encode_absmax

SHAPE = (3, 32 * NESTED_BLOCK_SIZE + 21)  # several groups of scales, a partial block, an odd tail


def weights(float_format: FloatFormat) -> Raw:
    return narrow(np.random.default_rng(1).normal(0, 0.02, SHAPE[0] * SHAPE[1]).astype(np.float32), float_format)


def arrays(float_format: FloatFormat, *, double_quant: bool, block_size: int = 32) -> PackedArrays:
    return encode_plain(weights(float_format), PackedShape(SHAPE, float_format, block_size, double_quant))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("float_format", list(FloatFormat))
def test_a_weight_is_encoded_and_decoded_as_by_the_reference(float_format: FloatFormat, double_quant: bool) -> None:
    raw, made = weights(float_format), arrays(float_format, double_quant=double_quant)
    packed, absmax = nf4.encode(widen(raw, float_format), block_size=32)
    if double_quant:
        nested = encode_absmax(absmax)
        absmax = decode_absmax(nested.codes, nested.nested_absmax, nested.offset)
    values = nf4.decode(packed, absmax, n_elements=raw.size, block_size=32)
    assert np.array_equal(made.packed, packed)
    assert np.array_equal(made.scales(), absmax)
    assert made.decode().shape == SHAPE
    assert np.array_equal(made.decode().reshape(-1), narrow(values, float_format))
    assert np.array_equal(made.decode(FloatFormat.F32).reshape(-1), values)
    assert made.largest_scale() >= np.abs(absmax).max()


@pytest.mark.parametrize("double_quant", [True, False])
def test_components_have_the_sizes_of_the_layout_and_give_the_weight_again(double_quant: bool) -> None:
    made = arrays(FloatFormat.BF16, double_quant=double_quant)
    parts = {part: np.frombuffer(data.tobytes(), np.uint8) for part, data in made.components().items()}
    assert {part: data.nbytes for part, data in parts.items()} == {
        part: spec.nbytes for part, spec in made.layout.components("w").items()
    }
    again = BlockScales.from_bytes(made.state, parts.__getitem__).with_codes(parts[Component.PACKED])
    assert {part: data.tobytes() for part, data in again.components().items()} == {
        part: data.tobytes() for part, data in parts.items()
    }


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("first_block", [0, 1, NESTED_BLOCK_SIZE - 1, NESTED_BLOCK_SIZE, 300])
def test_a_run_of_blocks_decodes_to_that_part_of_the_weight(first_block: int, double_quant: bool) -> None:
    made = arrays(FloatFormat.BF16, double_quant=double_quant)
    whole, start = made.decode().reshape(-1), 32 * first_block
    for n_elements in (32, 32 * 7, whole.size - start):
        codes = made.packed[start // 2 : (start + n_elements + 1) // 2]
        # The scales of the entire weight, and those of the run only: both know where the run begins.
        of_whole = made.with_codes(codes, first_block=first_block)
        parts = {part: np.frombuffer(data.tobytes(), np.uint8) for part, data in made.components().items()}
        width = made.absmax.itemsize
        parts[Component.ABSMAX] = parts[Component.ABSMAX][
            first_block * width : nf4.block_count(start + n_elements, 32) * width
        ]
        of_run = BlockScales.from_bytes(made.state, parts.__getitem__, first_block=first_block).with_codes(codes)
        for run in (of_whole, of_run):
            out = np.empty(n_elements, np.uint16)
            run.decode_into(out)
            assert np.array_equal(out, whole[start : start + n_elements])


def test_importing_the_record_loads_no_kernels() -> None:
    script = "import sys, qformat.artifact.packed_arrays; assert not {'numba', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
