"""The codec on CPUs: typed, checked entrances to the numba kernels. Same bits as the reference, into given buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qformat.codec import kernels
from qformat.codec.floats import FloatFormat, Raw
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count, packed_nbytes

_ENCODERS = {
    FloatFormat.BF16: kernels.encode_bf16,
    FloatFormat.F16: kernels.encode_f16,
    FloatFormat.F32: kernels.encode_f32,
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


def warm_up(float_format: FloatFormat, *, on_compile: Callable[[], None] | None = None) -> None:
    """Load from the cache, or compile, what a conversion from a format needs; `on_compile` tells that it takes long."""
    timer = threading.Timer(0.5, on_compile or (lambda: None))
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
