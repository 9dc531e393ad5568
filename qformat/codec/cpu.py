"""The codec on CPUs: typed, checked entrances to the numba kernels. Same bits as the reference, into given buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qformat.codec import kernels, shuffles
from qformat.codec.floats import FloatFormat, Raw
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.errors import UsageError

Decoder = Literal["avx512", "avx2", "plain"]

COMPILING_TAKES_S = 0.5
"""Loading the kernels from the cache takes a tenth of this, compiling them several times as long."""

_ENCODERS = {
    FloatFormat.BF16: kernels.encode_bf16,
    FloatFormat.F16: kernels.encode_f16,
    FloatFormat.F32: kernels.encode_f32,
}
_PLAIN_DECODERS = {
    FloatFormat.BF16: kernels.decode_bf16,
    FloatFormat.F16: kernels.decode_f16,
    FloatFormat.F32: kernels.decode_f32,
}
_SHUFFLE_DECODERS: dict[tuple[FloatFormat, Decoder], Any] = {
    (FloatFormat.BF16, "avx512"): shuffles.decode_bf16_avx512,
    (FloatFormat.BF16, "avx2"): shuffles.decode_bf16_avx2,
    (FloatFormat.F16, "avx512"): shuffles.decode_f16_avx512,
    (FloatFormat.F16, "avx2"): shuffles.decode_f16_avx2,
}
"""float32 has none: its output is so large that the plain loop is as fast as the memory."""

_NEEDED: dict[Decoder, frozenset[str]] = {
    "avx512": shuffles.AVX512_FEATURES,
    "avx2": shuffles.AVX2_FEATURES,
    "plain": frozenset(),
}


def encode_into(
    raw: Raw,
    float_format: FloatFormat,
    *,
    block_size: int,
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
) -> bool:
    """Encode raw weights [n] that begin at a block into `packed` [ceil(n/2)] and `absmax` [ceil(n/block_size)].

    Returns False, with useless outputs, if a weight is infinite or NaN.
    """
    assert packed.size == packed_nbytes(raw.size)
    assert absmax.size == block_count(raw.size, block_size)
    return bool(_ENCODERS[float_format](raw, block_size, packed, absmax))


def add_in_order(values: NDArray[np.float32], total: float) -> float:
    """Return the float64 `total` plus float32 values [n], added one after another in index order."""
    return float(kernels.add_in_order(values, total))


def encode_absmax_into(
    absmax: NDArray[np.float32],
    offset: np.float32,
    *,
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
) -> None:
    """Encode absmax [n] that begins at a nested block into `codes` [n] and `nested_absmax` [ceil(n/256)]."""
    assert codes.size == absmax.size
    assert nested_absmax.size == block_count(absmax.size, NESTED_BLOCK_SIZE)
    kernels.encode_absmax(absmax, offset, codes, nested_absmax)


def decode_scales_into(
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    nested_quant_map: NDArray[np.float32],
    nested_offset: np.float32,
    out: NDArray[np.float32],
    *,
    first_block: int = 0,
) -> None:
    """Decode absmax codes [n] of blocks `first_block`, ... into `out` [n]; the nested arrays are the whole tensor's."""
    assert out.size == codes.size
    assert nested_quant_map.size == 256
    assert nested_absmax.size >= block_count(first_block + codes.size, NESTED_BLOCK_SIZE)
    kernels.decode_scales(codes, nested_absmax, nested_quant_map, np.float32(nested_offset), first_block, out)


def decode_into(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    *,
    n_elements: int,
    block_size: int,
    float_format: FloatFormat,
    out: Raw,
    decoder: Decoder | None = None,
    workers: int = 1,
) -> None:
    """Decode `packed` [ceil(n/2)] with the scales of its blocks into `out` [n], raw elements of `float_format`.

    decoder: which lookup to use, by default the best that this CPU has. workers: threads to share the work.
    Raises UsageError for a decoder that this CPU lacks.
    """
    assert packed.size == packed_nbytes(n_elements)
    assert scales.size == block_count(n_elements, block_size)
    assert out.size == n_elements
    assert out.dtype == float_format.raw_dtype
    chosen = decoder_name() if decoder is None else checked_decoder(decoder)
    plain = _PLAIN_DECODERS[float_format]
    decode = _SHUFFLE_DECODERS.get((float_format, chosen), plain)
    n_whole = n_elements // block_size
    shares = [n_whole * worker // workers for worker in range(workers + 1)]

    def decode_share(first: int, last: int) -> None:
        elements = slice(first * block_size, last * block_size)
        half = slice(elements.start // 2, elements.stop // 2)
        decode(packed[half], scales[first:last], block_size, out[elements])

    if workers == 1:
        decode_share(0, n_whole)
    else:
        list(_pool(workers).map(decode_share, shares[:-1], shares[1:]))
    if n_elements % block_size:
        start = n_whole * block_size
        plain(packed[start // 2 :], scales[n_whole:], block_size, out[start:])


@cache
def decoder_name() -> Decoder:
    """Return the name of the lookup that is used on this CPU."""
    features = shuffles.cpu_features()
    return next(name for name, needed in _NEEDED.items() if needed <= features)


def checked_decoder(name: Decoder) -> Decoder:
    """Return the name if this CPU can run it. Raises UsageError if not: never a silent replacement."""
    if name not in _NEEDED:
        raise UsageError(f"decoder {name!r}: must be one of {', '.join(_NEEDED)}")
    missing = _NEEDED[name] - shuffles.cpu_features()
    if missing:
        raise UsageError(f"decoder {name!r}: this CPU lacks {', '.join(sorted(missing))}")
    return name


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="qformat-decode")


def warm_up(float_format: FloatFormat, *, on_compile: Callable[[], None] | None = None) -> None:
    """Load from the cache, or compile, what a conversion from a format needs; `on_compile` tells that it takes long."""
    timer = threading.Timer(COMPILING_TAKES_S, on_compile or (lambda: None))
    timer.daemon = True
    timer.start()
    try:
        raw = np.zeros(64, float_format.raw_dtype)
        absmax = np.empty(1, np.float32)
        encode_into(raw, float_format, block_size=64, packed=np.empty(32, np.uint8), absmax=absmax)
        add_in_order(absmax, 0.0)
        encode_absmax_into(absmax, np.float32(0), codes=np.empty(1, np.uint8), nested_absmax=np.empty(1, np.float32))
    finally:
        timer.cancel()
