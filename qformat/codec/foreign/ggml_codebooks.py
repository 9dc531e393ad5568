"""Decoders of ggml's blocks whose 4-bit codes are indices into a table of values: IQ4_NL, IQ4_XS and MXFP4.

The conventions are those of `ggml_blocks`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformat.codec.foreign.ggml_blocks import decoder, half_at

_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # fmt: skip
_MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the values of E2M1. Code 8 is 0 and not -0, as in ggml, where the table has integers."""

_HALF_POWERS = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)
"""Half of the power of two that an exponent of a block stands for. ggml reads 255 as a number, too."""


@decoder
def decode_iq4_nl(blocks: Any, out: Any) -> None:
    """Decode IQ4_NL blocks: scale * table[code].

    Layout: scale (float16), 16 bytes of two codes each. The low nibbles are the first 16 codes.

    Args:
        blocks: Blocks, uint8 [n_blocks * 18].
        out: Array for the values, float32 [n_blocks * 32].
    """
    for i in range(out.size // 32):
        scale = half_at(blocks, i * 18)
        for j in range(16):
            pair = np.int32(blocks[i * 18 + 2 + j])
            out[i * 32 + j] = scale * _IQ4_VALUES[pair & 15]
            out[i * 32 + 16 + j] = scale * _IQ4_VALUES[pair >> 4]


@decoder
def decode_iq4_xs(blocks: Any, out: Any) -> None:
    """Decode IQ4_XS blocks: (d * (scale - 32)) * table[code].

    Layout: d (float16), the upper two bits of 8 scales (2 bytes), the lower four bits of 8 scales (4 bytes), 128 bytes
    of two codes each. Each group of 32 weights has a scale and 16 bytes, with its first 16 codes in the low nibbles.

    Args:
        blocks: Blocks, uint8 [n_blocks * 136].
        out: Array for the values, float32 [n_blocks * 256].
    """
    for i in range(out.size // 256):
        at = i * 136
        d = half_at(blocks, at)
        for group in range(8):
            low = (np.int32(blocks[at + 4 + group // 2]) >> (4 * (group % 2))) & 15
            high = (np.int32(blocks[at + 2 + group // 4]) >> (2 * (group % 4))) & 3
            scale = d * np.float32((low | (high << 4)) - 32)
            first = i * 256 + group * 32
            for j in range(16):
                pair = np.int32(blocks[at + 8 + group * 16 + j])
                out[first + j] = scale * _IQ4_VALUES[pair & 15]
                out[first + 16 + j] = scale * _IQ4_VALUES[pair >> 4]


@decoder
def decode_mxfp4(blocks: Any, out: Any) -> None:
    """Decode MXFP4 blocks: 2^(exponent - 128) * table[code].

    Layout: exponent (1 byte), 16 bytes of two codes each. The low nibbles are the first 16 codes.

    Args:
        blocks: Blocks, uint8 [n_blocks * 17].
        out: Array for the values, float32 [n_blocks * 32].
    """
    for i in range(out.size // 32):
        scale = _HALF_POWERS[np.int64(blocks[i * 17])]
        for j in range(16):
            pair = np.int32(blocks[i * 17 + 1 + j])
            out[i * 32 + j] = scale * _MXFP4_VALUES[pair & 15]
            out[i * 32 + 16 + j] = scale * _MXFP4_VALUES[pair >> 4]
