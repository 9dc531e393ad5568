"""Counts the differences between two packed weights, and between stored scales and those that encoding gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.packed_arrays import BlockScales
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.cpu.blocks import add_in_order, encode_absmax_into
from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count
from qformat.converters.encode.task_writer import ABSMAX_CHUNK


def count_different(found: NDArray[Any], expected: NDArray[Any]) -> int:
    """Return the number of elements in which two arrays differ, compared bit for bit.

    Args:
        found: First array.
        expected: Second array, of the same size and dtype.
    """
    if found.dtype.kind == "f":
        found, expected = found.view(np.uint32), expected.view(np.uint32)
    return 0 if np.array_equal(found, expected) else int(np.count_nonzero(found != expected))


def count_different_codes(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> int:
    """Return the number of codes that differ. The padding of a tensor with an odd number of elements counts as a code.

    Args:
        found: Packed codes, uint8.
        expected: Packed codes, uint8, of the same size.
    """
    if np.array_equal(found, expected):
        return 0
    changed = found ^ expected
    return int(np.count_nonzero(changed >> 4) + np.count_nonzero(changed & 15))


def count_different_scales(found: BlockScales, expected: BlockScales) -> int:
    """Return how many scale values of a weight differ from those in another file.

    Args:
        found: Scales of the weight.
        expected: Scales in the other file.
    """
    n_different = int(found.state != expected.state) + count_different(found.absmax, expected.absmax)
    for ours, theirs in (
        (found.nested_absmax, expected.nested_absmax),
        (found.nested_quant_map, expected.nested_quant_map),
    ):
        if ours is not None and theirs is not None:
            n_different += count_different(ours, theirs)
    return n_different


def count_wrong_scales(found: BlockScales, absmax: Raw, float_format: FloatFormat) -> int:
    """Return how many stored scale values of a weight differ from what its source gives.

    Args:
        found: Stored scales of the weight.
        absmax: Absmax values of the source as raw bits, [n_blocks].
        float_format: Format of the absmax values.
    """
    if found.second_level is None:
        return sum(
            count_different(found.absmax[start : start + values.size], values)
            for start, values in _absmax_chunks(absmax, float_format)
        )
    nested_absmax, nested_quant_map, _ = found.second_level
    total = 0.0
    for _, values in _absmax_chunks(absmax, float_format):
        total = add_in_order(values, total)
    offset = np.float32(total / absmax.size if absmax.size else 0)
    n_wrong = int(found.state.nested_offset != float(offset)) + count_different(nested_quant_map, DYNAMIC_MAP)
    for start, values in _absmax_chunks(absmax, float_format):
        codes = np.empty(values.size, np.uint8)
        nested = np.empty(block_count(values.size, NESTED_BLOCK_SIZE), np.float32)
        encode_absmax_into(values, offset, codes=codes, nested_absmax=nested)
        group = start // NESTED_BLOCK_SIZE
        n_wrong += count_different(found.absmax[start : start + values.size], codes)
        n_wrong += count_different(nested_absmax[group : group + nested.size], nested)
    return n_wrong


def _absmax_chunks(absmax: Raw, float_format: FloatFormat) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, absmax.size, ABSMAX_CHUNK):
        yield start, widen(absmax[start : start + ABSMAX_CHUNK], float_format)
