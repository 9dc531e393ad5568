"""Reference implementation of NF4 in numpy, to which every other implementation is compared (spec section 4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.codec.codebooks import NF4_CODEBOOK, NF4_THRESHOLDS

BLOCK_SIZES = (32, 64, 128, 256)
"""Block sizes of format version 1: numbers of elements that share one absmax."""

DEFAULT_BLOCK_SIZE = 64
"""Default block size of a conversion, the same as that of bitsandbytes."""

SMALLEST_DIVISOR = np.float32(1e-38)
"""Smallest divisor of the weights of a block. It avoids a division by zero in a block of zeros."""


def block_count(n_elements: int, block_size: int) -> int:
    """Return the number of blocks of a tensor, including a partial last one.

    Args:
        n_elements: Number of elements of the tensor.
        block_size: Number of elements per block.
    """
    return -(-n_elements // block_size)


def packed_nbytes(n_elements: int) -> int:
    """Return the number of bytes of packed codes. With an odd number of elements, the last low nibble is unused."""
    return -(-n_elements // 2)


def encode(values: NDArray[np.float32], *, block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Encode values as NF4 codes with one absmax per block.

    As in bitsandbytes, the values of a complete block are multiplied by the float32 reciprocal of its absmax, and those
    of a partial last block are divided by its absmax. A code is the number of thresholds strictly below the result.

    Args:
        values: Values, float32 [n], all finite.
        block_size: Number of elements per block.

    Returns:
        The packed codes, uint8 [ceil(n / 2)], and the absmax values, float32 [ceil(n / block_size)].
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
    """Decode packed codes: each value is the codebook's value times the absmax of its block.

    Args:
        packed: Packed codes, uint8 [ceil(n_elements / 2)].
        absmax: Absmax values, float32 [ceil(n_elements / block_size)].
        n_elements: Number of elements.
        block_size: Number of elements per block.

    Returns:
        The values, float32 [n_elements].
    """
    values = NF4_CODEBOOK[unpack(packed, n_elements=n_elements)]
    return values * np.repeat(absmax, block_size)[:n_elements]


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes, uint8 [n], into bytes. The first of a pair is in the high nibble; 7 completes an odd last pair."""
    even = np.append(codes, np.uint8(7)) if codes.size % 2 else codes
    return (even[0::2] << np.uint8(4)) | even[1::2]


def unpack(packed: NDArray[np.uint8], *, n_elements: int) -> NDArray[np.uint8]:
    """Unpack codes.

    Args:
        packed: Packed codes, uint8 [ceil(n_elements / 2)].
        n_elements: Number of codes.

    Returns:
        The codes, uint8 [n_elements].
    """
    return np.stack((packed >> np.uint8(4), packed & np.uint8(15)), axis=1).reshape(-1)[:n_elements]
