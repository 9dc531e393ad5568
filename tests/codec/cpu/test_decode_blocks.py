"""Decoding on CPUs is bit-identical to the reference at every size, in parts and in threads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from qformat.codec import nested, nf4
from qformat.codec.cpu import blocks
from qformat.codec.cpu.blocks import Instructions
from qformat.codec.floats import FloatFormat
from qformat.codec.nested import NESTED_BLOCK_SIZE
from tests.codec.cpu.sample_blocks import (
    FORMATS,
    RUNNABLE,
    Guarded,
    as_mapped,
    decoded_by_reference,
    double_quantized,
    sizes_around,
)


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
    n_blocks = 64 * NESTED_BLOCK_SIZE + 777  # more scales than fit in one pass
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
def test_any_number_of_workers_gives_the_same_bytes(workers: int) -> None:
    n = 64 * 1009 + 3
    packed, second = double_quantized(n, 64)
    scales = nested.decode_absmax(second.codes, second.nested_absmax, second.offset)
    expected = decoded_by_reference(packed, second, n, 64, FloatFormat.BF16)
    out, from_nested = np.empty(n, np.uint16), np.empty(n, np.uint16)
    shares = {"workers": workers, "smallest_share": 1000}
    common = {"n_elements": n, "block_size": 64, "float_format": FloatFormat.BF16, **shares}
    blocks.decode_into(packed, scales, out=out, **common)  # type: ignore[arg-type]
    blocks.decode_nested_into(packed, second.codes, second.nested_absmax, second.offset, out=from_nested, **common)  # type: ignore[arg-type]
    assert np.array_equal(out, expected)
    assert np.array_equal(from_nested, expected)


def test_threads_work_in_a_forked_child() -> None:
    """A child inherits its parent's pool without the threads: using it would wait forever."""
    script = """
import os, numpy as np
from qformat.codec.cpu import blocks
from qformat.codec.floats import FloatFormat
def decode():
    out = np.empty(8192, np.float32)
    blocks.decode_into(np.zeros(4096, np.uint8), np.ones(128, np.float32), n_elements=8192, block_size=64,
                    float_format=FloatFormat.F32, out=out, workers=2, smallest_share=1000)
    assert (out == -1).all()
decode()
child = os.fork()
decode()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
