"""Encoding and decoding on CPUs: functions that check their arrays and call the numba kernels (spec sections 4 and 5).

The results are bit-identical to the reference implementation. The arrays of a weight, here with blocks of 64:

                      block 0            block 1                    block 255         block 256
    elements       | w0 w1 ... w63    | w64 w65 ... w127  | ...  | ... w16383       | w16384 ...   row-major order
    packed         | w0:w1 ... w62:w63| w64:w65 ...       | ...  | ...              | ...          high:low nibble
    absmax         | a0               | a1                | ...  | a255             | a256 ...     1 per block
    nested_absmax  | n0                                                             | n1 ...       1 per 256 absmax

An element is decoded as codebook[code] * scale. The scale of block j is its absmax; with double quantization `absmax`
contains 8-bit codes, and the scale is map[absmax[j]] * nested_absmax[j // 256] + offset.

The kernels process complete blocks. The reference implementation processes a partial last block.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codec import nf4
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.cpu import kernels, lanes, shuffles
from qformat.codec.cpu.kernels import Kernel
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.errors import UsageError

Instructions = Literal["avx512", "avx2", "plain"]

SMALLEST_SHARE = 1 << 21
"""Smallest number of weights per thread: one thread decodes 2^20 weights at 20,000 M/s, two at 9,000 M/s."""

_SCALES_AT_ONCE = 64 * NESTED_BLOCK_SIZE
"""Number of scales of a double-quantized tensor to decode at a time: 64 KiB fit the cache, and calls cost only 2%."""


def encode_into(
    raw: Raw,
    float_format: FloatFormat,
    *,
    block_size: int,
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    encoder: Instructions | None = None,
) -> bool:
    """Encode a weight, or a part of it that begins at a block.

    Args:
        raw: Raw elements [n].
        float_format: Float format of the elements.
        block_size: Number of elements per block.
        packed: Array for the packed codes, uint8 [ceil(n / 2)].
        absmax: Array for the absmax values, float32 [ceil(n / block_size)].
        encoder: Instructions to use, by default the best of this CPU.

    Returns:
        False if an element is NaN or Inf. The outputs are then undefined.

    Raises:
        UsageError: The dtypes or sizes of the arrays do not match, or this CPU lacks the instructions.
    """
    _require("raw", raw, float_format.raw_dtype, raw.size)
    _require("packed", packed, np.uint8, packed_nbytes(raw.size))
    _require("absmax", absmax, np.float32, block_count(raw.size, block_size))
    n = raw.size - raw.size % max(block_size, shuffles.ENCODED_AT_ONCE)
    encode = _encoder(float_format, encoder)
    finite = bool(encode(raw[:n], block_size, packed[: n // 2], absmax[: n // block_size]))
    if n < raw.size:
        values = widen(raw[n:], float_format)
        if not np.isfinite(values).all():
            return False
        packed[n // 2 :], absmax[n // block_size :] = nf4.encode(values, block_size=block_size)
    return finite


def add_in_order(values: NDArray[np.float32], total: float) -> float:
    """Add values to a sum in index order.

    Args:
        values: Values to add, float32 [n].
        total: Sum so far, in float64.

    Returns:
        The new sum.
    """
    _require("values", values, np.float32, values.size)
    return float(kernels.add_in_order(values, total))


def encode_absmax_into(
    absmax: NDArray[np.float32],
    offset: np.float32,
    *,
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
) -> None:
    """Encode the absmax values of a weight, or of a part of it that begins at a group of 256.

    Args:
        absmax: Absmax values, float32 [n].
        offset: Mean of the absmax values of the entire weight.
        codes: Array for the codes, uint8 [n].
        nested_absmax: Array for the nested absmax values, float32 [ceil(n / 256)].

    Raises:
        UsageError: The dtypes or sizes of the arrays do not match.
    """
    _require("absmax", absmax, np.float32, absmax.size)
    _require("codes", codes, np.uint8, absmax.size)
    _require("nested_absmax", nested_absmax, np.float32, block_count(absmax.size, NESTED_BLOCK_SIZE))
    kernels.encode_absmax(absmax, offset, codes, nested_absmax)


def decode_scales_into(
    absmax_codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    nested_quant_map: NDArray[np.float32],
    nested_offset: np.float32,
    out: NDArray[np.float32],
    *,
    first_block: int = 0,
) -> None:
    """Decode the absmax codes of consecutive blocks.

    Args:
        absmax_codes: Codes of the absmax values, uint8 [n].
        nested_absmax: Nested absmax values of the entire weight, float32.
        nested_quant_map: Codebook of the absmax values, float32 [256].
        nested_offset: Mean of the absmax values of the entire weight.
        out: Array for the scales, float32 [n].
        first_block: Index of the first block in the weight.

    Raises:
        UsageError: The dtypes or sizes of the arrays do not match.
    """
    _require("absmax_codes", absmax_codes, np.uint8, absmax_codes.size)
    _require_nested(nested_absmax, nested_quant_map, first_block, absmax_codes.size)
    _require("out", out, np.float32, absmax_codes.size)
    kernels.decode_scales(absmax_codes, nested_absmax, nested_quant_map, np.float32(nested_offset), first_block, out)


def decode_into(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    *,
    n_elements: int,
    block_size: int,
    float_format: FloatFormat,
    out: Raw,
    decoder: Instructions | None = None,
    workers: int = 1,
    smallest_share: int = SMALLEST_SHARE,
) -> None:
    """Decode a weight, or a part of it that begins at a block, with given scales.

    Args:
        packed: Packed codes, uint8 [ceil(n_elements / 2)].
        scales: Scale of each block, float32 [ceil(n_elements / block_size)].
        n_elements: Number of elements.
        block_size: Number of elements per block.
        float_format: Float format of the result.
        out: Array for the raw elements [n_elements].
        decoder: Instructions to use, by default the best of this CPU.
        workers: Largest number of threads.
        smallest_share: Smallest number of elements per thread.

    Raises:
        UsageError: The dtypes or sizes of the arrays do not match, or this CPU lacks the instructions.
    """
    _require_block_size(block_size)
    _require("packed", packed, np.uint8, packed_nbytes(n_elements))
    _require("scales", scales, np.float32, block_count(n_elements, block_size))
    _require("out", out, float_format.raw_dtype, n_elements)
    decode = _decoder(float_format, decoder)

    def decode_blocks(first: int, last: int) -> None:
        elements = slice(first * block_size, last * block_size)
        packed_part = packed[elements.start // 2 : elements.stop // 2]
        decode(packed_part, scales[first:last], block_size, out[elements])

    n_whole = n_elements // block_size
    n_shares = max(1, min(workers, n_whole * block_size // smallest_share))
    _in_shares(decode_blocks, n_whole, n_shares=n_shares, workers=workers)
    if n_elements % block_size:
        _decode_tail(packed, scales[n_whole:], n_elements, block_size, float_format, out)


def decode_nested_into(
    packed: NDArray[np.uint8],
    absmax_codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    nested_offset: np.float32,
    *,
    n_elements: int,
    block_size: int,
    float_format: FloatFormat,
    out: Raw,
    nested_quant_map: NDArray[np.float32] = DYNAMIC_MAP,
    first_block: int = 0,
    decoder: Instructions | None = None,
    workers: int = 1,
    smallest_share: int = SMALLEST_SHARE,
) -> None:
    """Decode a double-quantized weight, or a part of it that begins at a block, without an array of all scales.

    Args:
        packed: Packed codes of the part, uint8 [ceil(n_elements / 2)].
        absmax_codes: Codes of the part's absmax values, uint8 [ceil(n_elements / block_size)].
        nested_absmax: Nested absmax values of the entire weight, float32.
        nested_offset: Mean of the absmax values of the entire weight.
        n_elements: Number of elements of the part.
        block_size: Number of elements per block.
        float_format: Float format of the result.
        out: Array for the raw elements [n_elements].
        nested_quant_map: Codebook of the absmax values, float32 [256].
        first_block: Index of the part's first block in the weight.
        decoder: Instructions to use, by default the best of this CPU.
        workers: Largest number of threads.
        smallest_share: Smallest number of elements per thread.

    Raises:
        UsageError: The dtypes or sizes of the arrays do not match, or this CPU lacks the instructions.
    """
    _require_block_size(block_size)
    n_blocks = block_count(n_elements, block_size)
    _require("packed", packed, np.uint8, packed_nbytes(n_elements))
    _require("absmax_codes", absmax_codes, np.uint8, n_blocks)
    _require_nested(nested_absmax, nested_quant_map, first_block, n_blocks)
    _require("out", out, float_format.raw_dtype, n_elements)
    decode = _decoder(float_format, decoder)
    offset = np.float32(nested_offset)

    def scales_of(first: int, last: int) -> NDArray[np.float32]:
        scales = np.empty(last - first, np.float32)
        group = (first_block + first) // NESTED_BLOCK_SIZE
        within = (first_block + first) % NESTED_BLOCK_SIZE
        kernels.decode_scales(absmax_codes[first:last], nested_absmax[group:], nested_quant_map, offset, within, scales)
        return scales

    def decode_blocks(first: int, last: int) -> None:
        for start in range(first, last, _SCALES_AT_ONCE):
            stop = min(start + _SCALES_AT_ONCE, last)
            elements = slice(start * block_size, stop * block_size)
            packed_part = packed[elements.start // 2 : elements.stop // 2]
            decode(packed_part, scales_of(start, stop), block_size, out[elements])

    n_whole = n_elements // block_size
    n_shares = max(1, min(workers, n_whole * block_size // smallest_share))
    _in_shares(decode_blocks, n_whole, n_shares=n_shares, workers=workers)
    if n_whole < n_blocks:
        _decode_tail(packed, scales_of(n_whole, n_blocks), n_elements, block_size, float_format, out)


def warm_up(float_format: FloatFormat) -> None:
    """Load the kernels of a conversion from a float format from the cache, or compile them."""
    for kernel in (_encoder(float_format, None), kernels.add_in_order, kernels.encode_absmax):
        kernel.compile()


@cache
def decoder_name() -> Instructions:
    """Return the name of the best instructions of this CPU for encoding and decoding."""
    features = lanes.cpu_features()
    return next((name for name, needed in lanes.NEEDED_FEATURES.items() if needed <= features), "plain")


def _encoder(float_format: FloatFormat, name: Instructions | None) -> Kernel:
    chosen = decoder_name() if name is None else _available(name)
    return kernels.ENCODERS[float_format] if chosen == "plain" else shuffles.ENCODERS[chosen, float_format]


def _decoder(float_format: FloatFormat, name: Instructions | None) -> Kernel:
    chosen = decoder_name() if name is None else _available(name)
    return kernels.DECODERS[float_format] if chosen == "plain" else shuffles.DECODERS[chosen, float_format]


def _available(name: Instructions) -> Instructions:
    """Return the name if this CPU has the instructions. Raises UsageError otherwise, never a silent replacement."""
    if name == "plain":
        return name
    if name not in lanes.NEEDED_FEATURES:
        raise UsageError(f"instructions {name!r}: must be one of {', '.join(lanes.NEEDED_FEATURES)}, plain")
    missing = lanes.NEEDED_FEATURES[name] - lanes.cpu_features()
    if missing:
        raise UsageError(f"instructions {name!r}: this CPU lacks {', '.join(sorted(missing))}")
    return name


def _require(name: str, array: NDArray[np.generic], dtype: type | np.dtype[np.generic], size: int) -> None:
    """Raise UsageError for an array that the kernels would misread, because they do not check their arrays."""
    if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
        kind = "contiguous" if array.flags.c_contiguous else "strided"
        raise UsageError(
            f"{name}: found {kind} {array.dtype} of shape {list(array.shape)}, "
            f"expected contiguous {np.dtype(dtype)} [{size}]"
        )


def _require_block_size(block_size: int) -> None:
    if block_size not in nf4.BLOCK_SIZES:
        raise UsageError(f"block size {block_size}: must be one of {', '.join(map(str, nf4.BLOCK_SIZES))}")


def _require_nested(
    nested_absmax: NDArray[np.float32], nested_quant_map: NDArray[np.float32], first_block: int, n_blocks: int
) -> None:
    _require("nested_absmax", nested_absmax, np.float32, nested_absmax.size)
    _require("nested_quant_map", nested_quant_map, np.float32, DYNAMIC_MAP.size)
    if first_block < 0 or nested_absmax.size < block_count(first_block + n_blocks, NESTED_BLOCK_SIZE):
        raise UsageError(
            f"nested_absmax: has {nested_absmax.size} values, too few for blocks {first_block} to "
            f"{first_block + n_blocks}"
        )


def _in_shares(decode_blocks: Callable[[int, int], None], n_blocks: int, *, n_shares: int, workers: int) -> None:
    """Call decode_blocks(first, last) for each share of the blocks, the first share in this thread."""
    bounds = [n_blocks * share // n_shares for share in range(n_shares + 1)]
    others = [_pool(workers).submit(decode_blocks, *share) for share in pairwise(bounds[1:])]
    decode_blocks(bounds[0], bounds[1])
    for other in others:
        other.result()


def _decode_tail(
    packed: NDArray[np.uint8],
    scale: NDArray[np.float32],
    n_elements: int,
    block_size: int,
    float_format: FloatFormat,
    out: Raw,
) -> None:
    start = n_elements - n_elements % block_size
    values = nf4.decode(packed[start // 2 :], scale, n_elements=n_elements - start, block_size=block_size)
    out[start:] = narrow(values, float_format)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child inherits the pool, but not its threads
    return ThreadPoolExecutor(workers - 1, thread_name_prefix="qformat-decode")
