"""Decoders of ggml's quantized blocks, as in a GGUF file, to float32. The values are those of ggml and gguf-py.

A row is divided into blocks of 32 or 256 weights. A block contains its float16 scales and its codes, in an order that
suits ggml's kernels. The docstring of each kernel describes the bytes of a block and the formula of a value, which is
computed in float32 in the written order, without fused operations. The kernels are plain numba on flat arrays of
complete blocks and run without the GIL. Callers check the sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from qformat.codec.cpu.kernels import filled, kernel, taken
from qformat.codec.cpu.scalars import rounded_to_bf16

_HALF_VALUES = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)

decoder: Callable[..., Any] = kernel(types.void(taken(types.uint8), filled(types.float32)))
"""Compiles a function decode(blocks uint8 [n_blocks * block_nbytes], out float32 [n_blocks * block_size])."""

inline = njit(inline="always")
"""Compiles a function into its callers."""


@inline
def half_at(data: Any, at: Any) -> Any:
    """Return a float16 value as float32.

    Args:
        data: Blocks, uint8.
        at: Index of the value's first byte.
    """
    return _HALF_VALUES[np.int64(data[at]) | (np.int64(data[at + 1]) << 8)]


@inline
def _signed(byte: Any) -> Any:
    return np.float32(np.int32(byte) - ((np.int32(byte) & 128) << 1))


@decoder
def decode_q8_0(blocks: Any, out: Any) -> None:
    """Decode Q8_0 blocks: code * scale.

    Layout: scale (float16), 32 signed codes (1 byte each).

    Args:
        blocks: Blocks, uint8 [n_blocks * 34].
        out: Array for the values, float32 [n_blocks * 32].
    """
    for i in range(out.size // 32):
        scale = half_at(blocks, i * 34)
        for j in range(32):
            out[i * 32 + j] = _signed(blocks[i * 34 + 2 + j]) * scale


@decoder
def decode_q4_0(blocks: Any, out: Any) -> None:
    """Decode Q4_0 blocks: scale * (code - 8).

    Layout: scale (float16), 16 bytes of two codes each. The low nibbles are the first 16 codes.

    Args:
        blocks: Blocks, uint8 [n_blocks * 18].
        out: Array for the values, float32 [n_blocks * 32].
    """
    for i in range(out.size // 32):
        scale = half_at(blocks, i * 18)
        for j in range(16):
            pair = np.int32(blocks[i * 18 + 2 + j])
            out[i * 32 + j] = scale * np.float32((pair & 15) - 8)
            out[i * 32 + 16 + j] = scale * np.float32((pair >> 4) - 8)


@decoder
def decode_q4_1(blocks: Any, out: Any) -> None:
    """Decode Q4_1 blocks: scale * code + minimum.

    Layout: scale (float16), minimum (float16), 16 bytes of two codes each.

    Args:
        blocks: Blocks, uint8 [n_blocks * 20].
        out: Array for the values, float32 [n_blocks * 32].
    """
    for i in range(out.size // 32):
        scale, minimum = half_at(blocks, i * 20), half_at(blocks, i * 20 + 2)
        for j in range(16):
            pair = np.int32(blocks[i * 20 + 4 + j])
            out[i * 32 + j] = scale * np.float32(pair & 15) + minimum
            out[i * 32 + 16 + j] = scale * np.float32(pair >> 4) + minimum


@decoder
def decode_q5_0(blocks: Any, out: Any) -> None:
    """Decode Q5_0 blocks: scale * (code - 16).

    Layout: scale (float16), 32 fifth bits, 16 bytes with the lower four bits of two codes each.

    Args:
        blocks: Blocks, uint8 [n_blocks * 22].
        out: Array for the values, float32 [n_blocks * 32].
    """
    for i in range(out.size // 32):
        at = i * 22
        scale = half_at(blocks, at)
        for j in range(16):
            pair = np.int32(blocks[at + 6 + j])
            low = (np.int32(blocks[at + 2 + j // 8]) >> (j % 8)) & 1
            high = (np.int32(blocks[at + 4 + j // 8]) >> (j % 8)) & 1
            out[i * 32 + j] = scale * np.float32(((pair & 15) | (low << 4)) - 16)
            out[i * 32 + 16 + j] = scale * np.float32(((pair >> 4) | (high << 4)) - 16)


@decoder
def decode_q5_1(blocks: Any, out: Any) -> None:
    """Decode Q5_1 blocks: scale * code + minimum.

    Layout: scale (float16), minimum (float16), 32 fifth bits, 16 bytes with the lower four bits of two codes each.

    Args:
        blocks: Blocks, uint8 [n_blocks * 24].
        out: Array for the values, float32 [n_blocks * 32].
    """
    for i in range(out.size // 32):
        at = i * 24
        scale, minimum = half_at(blocks, at), half_at(blocks, at + 2)
        for j in range(16):
            pair = np.int32(blocks[at + 8 + j])
            low = (np.int32(blocks[at + 4 + j // 8]) >> (j % 8)) & 1
            high = (np.int32(blocks[at + 6 + j // 8]) >> (j % 8)) & 1
            out[i * 32 + j] = scale * np.float32((pair & 15) | (low << 4)) + minimum
            out[i * 32 + 16 + j] = scale * np.float32((pair >> 4) | (high << 4)) + minimum


@decoder
def decode_q2_k(blocks: Any, out: Any) -> None:
    """Decode Q2_K blocks: (d * scale) * code - (dmin * minimum).

    Layout: 16 bytes with a scale and a minimum of 4 bits each, 64 bytes of 2-bit codes, d and dmin (float16).

    Args:
        blocks: Blocks, uint8 [n_blocks * 84].
        out: Array for the values, float32 [n_blocks * 256].
    """
    for i in range(out.size // 256):
        at = i * 84
        d, dmin = half_at(blocks, at + 80), half_at(blocks, at + 82)
        for group in range(16):
            both = np.int32(blocks[at + group])
            scale, minimum = d * np.float32(both & 15), dmin * np.float32(both >> 4)
            first = at + 16 + (group // 8) * 32 + (group % 2) * 16
            shift = 2 * (group % 8 // 2)
            for j in range(16):
                code = (np.int32(blocks[first + j]) >> shift) & 3
                out[i * 256 + group * 16 + j] = scale * np.float32(code) - minimum


@decoder
def decode_q3_k(blocks: Any, out: Any) -> None:
    """Decode Q3_K blocks: (d * (scale - 32)) * (code - 4), or * code if its third bit is set.

    Layout: 256 third bits, 64 bytes of 2-bit codes, 16 scales of 6 bits each, d (float16).

    Args:
        blocks: Blocks, uint8 [n_blocks * 110].
        out: Array for the values, float32 [n_blocks * 256].
    """
    for i in range(out.size // 256):
        at = i * 110
        d = half_at(blocks, at + 108)
        for group in range(16):
            low = (np.int32(blocks[at + 96 + group % 8]) >> (4 * (group // 8))) & 15
            high = (np.int32(blocks[at + 104 + group % 4]) >> (2 * (group // 4))) & 3
            scale = d * np.float32((low | (high << 4)) - 32)
            within = (group % 2) * 16
            first = at + 32 + (group // 8) * 32 + within
            shift, bit = 2 * (group % 8 // 2), group // 2
            for j in range(16):
                code = (np.int32(blocks[first + j]) >> shift) & 3
                third = (np.int32(blocks[at + within + j]) >> bit) & 1
                out[i * 256 + group * 16 + j] = scale * np.float32(code - 4 * (1 - third))


@inline
def _six_bits(blocks: Any, at: Any, group: Any) -> Any:
    """Return the number of one of 8 groups: all 6 bits for the first four groups, the upper 2 bits for the others."""
    low = np.int32(blocks[at + group % 4])
    return low & 63 if group < 4 else low >> 6 << 4


@inline
def _scale_and_minimum(blocks: Any, at: Any, group: Any) -> Any:
    """Return (d * scale, dmin * minimum) of one of 8 groups: d and dmin are at `at`, then 12 bytes of 6-bit numbers."""
    scale, minimum = _six_bits(blocks, at + 4, group), _six_bits(blocks, at + 8, group)
    if group >= 4:
        rest = np.int32(blocks[at + 12 + group - 4])
        scale, minimum = scale | (rest & 15), minimum | (rest >> 4)
    return half_at(blocks, at) * np.float32(scale), half_at(blocks, at + 2) * np.float32(minimum)


@decoder
def decode_q4_k(blocks: Any, out: Any) -> None:
    """Decode Q4_K blocks: (d * scale) * code - (dmin * minimum).

    Layout: d and dmin (float16), 12 bytes with scales and minimums of 6 bits each, 128 bytes of two codes each.

    Args:
        blocks: Blocks, uint8 [n_blocks * 144].
        out: Array for the values, float32 [n_blocks * 256].
    """
    for i in range(out.size // 256):
        at = i * 144
        for group in range(8):
            scale, minimum = _scale_and_minimum(blocks, at, group)
            first, shift = at + 16 + (group // 2) * 32, 4 * (group % 2)
            for j in range(32):
                code = (np.int32(blocks[first + j]) >> shift) & 15
                out[i * 256 + group * 32 + j] = scale * np.float32(code) - minimum


@decoder
def decode_q5_k(blocks: Any, out: Any) -> None:
    """Decode Q5_K blocks: (d * scale) * code - (dmin * minimum).

    Layout: that of Q4_K, with 32 bytes of fifth bits between the scales and the codes.

    Args:
        blocks: Blocks, uint8 [n_blocks * 176].
        out: Array for the values, float32 [n_blocks * 256].
    """
    for i in range(out.size // 256):
        at = i * 176
        for group in range(8):
            scale, minimum = _scale_and_minimum(blocks, at, group)
            first, shift = at + 48 + (group // 2) * 32, 4 * (group % 2)
            for j in range(32):
                code = (np.int32(blocks[first + j]) >> shift) & 15
                fifth = (np.int32(blocks[at + 16 + j]) >> group) & 1
                out[i * 256 + group * 32 + j] = scale * np.float32(code | (fifth << 4)) - minimum


@decoder
def decode_q6_k(blocks: Any, out: Any) -> None:
    """Decode Q6_K blocks: (d * scale) * (code - 32).

    Layout: 128 bytes with the lower four bits of two codes each, 64 bytes with the upper two bits of four codes each,
    16 signed scales (1 byte each), d (float16).

    Args:
        blocks: Blocks, uint8 [n_blocks * 210].
        out: Array for the values, float32 [n_blocks * 256].
    """
    for i in range(out.size // 256):
        at = i * 210
        d = half_at(blocks, at + 208)
        for group in range(16):
            scale = d * _signed(blocks[at + 192 + group])
            half, quarter, within = group // 8, group % 8 // 2, (group % 2) * 16
            low_at = at + half * 64 + (quarter % 2) * 32 + within
            high_at = at + 128 + half * 32 + within
            for j in range(16):
                low = (np.int32(blocks[low_at + j]) >> (4 * (quarter // 2))) & 15
                high = (np.int32(blocks[high_at + j]) >> (2 * quarter)) & 3
                out[i * 256 + group * 16 + j] = scale * np.float32((low | (high << 4)) - 32)


@decoder
def decode_f16(blocks: Any, out: Any) -> None:
    """Convert float16 values, exactly.

    Args:
        blocks: Blocks, uint8 [n_blocks * 2].
        out: Array for the values, float32 [n_blocks].
    """
    for i in range(out.size):
        out[i] = half_at(blocks, 2 * i)


@decoder
def decode_bf16(blocks: Any, out: Any) -> None:
    """Convert bfloat16 values, exactly.

    Args:
        blocks: Blocks, uint8 [n_blocks * 2].
        out: Array for the values, float32 [n_blocks].
    """
    bits = out.view(np.uint32)
    for i in range(out.size):
        bits[i] = (np.uint32(blocks[2 * i]) << np.uint32(16)) | (np.uint32(blocks[2 * i + 1]) << np.uint32(24))


@decoder
def decode_f32(blocks: Any, out: Any) -> None:
    """Copy float32 values.

    Args:
        blocks: Blocks, uint8 [n_blocks * 4].
        out: Array for the values, float32 [n_blocks].
    """
    words = out.view(np.uint8)
    for i in range(words.size):
        words[i] = blocks[i]


@kernel(types.void(taken(types.float32), filled(types.uint16)))
def round_to_bf16(values: Any, out: Any) -> None:
    """Round float32 values to bfloat16, as `floats.narrow` does.

    Args:
        values: Values, float32 [n].
        out: Array for the bfloat16 bits, uint16 [n].
    """
    for i in range(out.size):
        out[i] = rounded_to_bf16(values[i])
