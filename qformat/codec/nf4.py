"""NF4 reference codec, first level: short, in numpy, the oracle of every other implementation (spec section 4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.codec.codebooks import NF4_CODEBOOK, NF4_THRESHOLDS

BLOCK_SIZES = (32, 64, 128, 256)
"""The block sizes of format version 1 (elements that share one absmax)."""

DEFAULT_BLOCK_SIZE = 64
"""What a conversion takes where nobody says otherwise; bitsandbytes' default as well."""

SMALLEST_DIVISOR = np.float32(1e-38)
"""A block's absmax is raised to this before weights are divided by it, so that an all-zero block divides."""


def block_count(n_elements: int, block_size: int) -> int:
    """Return how many blocks cover a tensor; the last one may be partial."""
    return -(-n_elements // block_size)


def packed_nbytes(n_elements: int) -> int:
    """Return how many bytes hold the codes of a tensor; an odd tensor's last low nibble is code 7 (zero)."""
    return -(-n_elements // 2)


def encode(values: NDArray[np.float32], *, block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Encode finite float32 values [n] into packed codes uint8 [ceil(n/2)] and absmax float32 [ceil(n/block_size)].

    Whole blocks multiply by the float32 reciprocal of their absmax, a last partial block divides by it, as
    bitsandbytes does; a code is the number of thresholds that lie strictly below the scaled weight.
    """
    n = values.size
    whole = n - n % block_size
    blocks = values[:whole].reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1, initial=0)
    reciprocal = np.float32(1) / np.maximum(absmax, SMALLEST_DIVISOR)
    scaled = (blocks * reciprocal[:, None]).reshape(-1)
    if whole < n:
        tail_absmax = np.abs(values[whole:]).max()
        absmax = np.append(absmax, tail_absmax)
        scaled = np.append(scaled, values[whole:] / np.maximum(tail_absmax, SMALLEST_DIVISOR))
    codes = np.searchsorted(NF4_THRESHOLDS, scaled, side="left").astype(np.uint8)
    return pack(codes), absmax


def decode(
    packed: NDArray[np.uint8], absmax: NDArray[np.float32], *, n_elements: int, block_size: int
) -> NDArray[np.float32]:
    """Decode packed codes into float32 values [n_elements]: codebook value times the block's absmax."""
    values = NF4_CODEBOOK[unpack(packed, n_elements=n_elements)]
    return values * np.repeat(absmax, block_size)[:n_elements]


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes [n] two to a byte, the first of a pair in the high nibble; an odd last one is paired with 7."""
    even = np.append(codes, np.uint8(7)) if codes.size % 2 else codes
    return (even[0::2] << np.uint8(4)) | even[1::2]


def unpack(packed: NDArray[np.uint8], *, n_elements: int) -> NDArray[np.uint8]:
    """Return the codes [n_elements] of packed bytes."""
    return np.stack((packed >> np.uint8(4), packed & np.uint8(15)), axis=1).reshape(-1)[:n_elements]
