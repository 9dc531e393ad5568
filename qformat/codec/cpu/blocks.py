"""The codec on CPUs: typed, checked entrances to the numba kernels. Same bits as the reference, into given buffers.

Kernels take whole blocks. A last partial block, at most one of a tensor, goes through the reference itself.
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
"""Weights that a thread is started for: 2^20 decode at 20,000 M/s on one thread, at 9,000 split between two."""

_SCALES_AT_ONCE = 64 * NESTED_BLOCK_SIZE
"""Scales of a double-quantized tensor that exist at a time: 64 KiB stay in the cache, a call costs 2% of its work."""


def encode_into(
    raw: Raw,
    float_format: FloatFormat,
    *,
    block_size: int,
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    encoder: Instructions | None = None,
) -> bool:
    """Encode raw weights [n] that begin at a block into `packed` [ceil(n/2)] and `absmax` [ceil(n/block_size)].

    encoder: the instructions to use, by default the best that this CPU has.
    Returns False, with useless outputs, if a weight is infinite or NaN.
    Raises UsageError for arrays that do not fit together, or instructions that this CPU lacks.
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
    """Return the float64 `total` plus float32 values [n], added one after another in index order."""
    _require("values", values, np.float32, values.size)
    return float(kernels.add_in_order(values, total))


def encode_absmax_into(
    absmax: NDArray[np.float32],
    offset: np.float32,
    *,
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
) -> None:
    """Encode absmax [n] that begins at a nested block into `codes` [n] and `nested_absmax` [ceil(n/256)].

    Raises UsageError for arrays that do not fit together.
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
    """Decode absmax codes [n] of blocks `first_block`, ... into `out` [n]; the nested arrays are the whole tensor's.

    Raises UsageError for arrays that do not fit together.
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
    """Decode `packed` [ceil(n/2)] with `scales` [ceil(n/block_size)] into `out` [n], raw elements of `float_format`.

    decoder: the instructions to use, by default the best that this CPU has. workers: threads that share the work, each
    at least `smallest_share` weights.
    Raises UsageError for arrays that do not fit together, or instructions that this CPU lacks.
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
    """Decode a double-quantized tensor, or a part of it that begins at a block, without an array of all its scales.

    packed [ceil(n/2)] and absmax_codes [ceil(n/block_size)] are those of the part, which begins at block
    `first_block` of the tensor; nested_absmax is the whole tensor's. The rest is as in `decode_into`.
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
    """Load from the cache, or compile, what a conversion from a format needs."""
    for kernel in (_encoder(float_format, None), kernels.add_in_order, kernels.encode_absmax):
        kernel.compile()


@cache
def decoder_name() -> Instructions:
    """Return the name of the instructions that encode and decode on this CPU."""
    features = lanes.cpu_features()
    return next((name for name, needed in lanes.NEEDED_FEATURES.items() if needed <= features), "plain")


def _encoder(float_format: FloatFormat, name: Instructions | None) -> Kernel:
    chosen = decoder_name() if name is None else _available(name)
    return kernels.ENCODERS[float_format] if chosen == "plain" else shuffles.ENCODERS[chosen, float_format]


def _decoder(float_format: FloatFormat, name: Instructions | None) -> Kernel:
    chosen = decoder_name() if name is None else _available(name)
    return kernels.DECODERS[float_format] if chosen == "plain" else shuffles.DECODERS[chosen, float_format]


def _available(name: Instructions) -> Instructions:
    """Return the name if this CPU can run it. Raises UsageError if not: never a silent replacement."""
    if name == "plain":
        return name
    if name not in lanes.NEEDED_FEATURES:
        raise UsageError(f"instructions {name!r}: must be one of {', '.join(lanes.NEEDED_FEATURES)}, plain")
    missing = lanes.NEEDED_FEATURES[name] - lanes.cpu_features()
    if missing:
        raise UsageError(f"instructions {name!r}: this CPU lacks {', '.join(sorted(missing))}")
    return name


def _require(name: str, array: NDArray[np.generic], dtype: type | np.dtype[np.generic], size: int) -> None:
    """Refuse what the kernels would misread: they trust dtype, size and contiguity."""
    if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
        kind = "contiguous" if array.flags.c_contiguous else "strided"
        raise UsageError(
            f"{name}: {kind} {array.dtype} array of shape {array.shape}, expected contiguous {np.dtype(dtype)} [{size}]"
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
            f"blocks {first_block} to {first_block + n_blocks}: only {nested_absmax.size} nested absmax values"
        )


def _in_shares(decode_blocks: Callable[[int, int], None], n_blocks: int, *, n_shares: int, workers: int) -> None:
    """Call decode_blocks(first, last) for all blocks: the first share in this thread, the others in the pool's."""
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
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool, but none of its threads
    return ThreadPoolExecutor(workers - 1, thread_name_prefix="qformat-decode")
