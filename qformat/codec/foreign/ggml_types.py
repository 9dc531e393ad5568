"""The table of ggml's storage formats that are read: names, sizes and decoders."""

from __future__ import annotations

from dataclasses import dataclass

from qformat.codec.cpu.kernels import Kernel
from qformat.codec.foreign.ggml_blocks import (
    decode_bf16,
    decode_f16,
    decode_f32,
    decode_q2_k,
    decode_q3_k,
    decode_q4_0,
    decode_q4_1,
    decode_q4_k,
    decode_q5_0,
    decode_q5_1,
    decode_q5_k,
    decode_q6_k,
    decode_q8_0,
)
from qformat.codec.foreign.ggml_codebooks import decode_iq4_nl, decode_iq4_xs, decode_mxfp4


@dataclass(frozen=True, slots=True)
class BlockType:
    """Storage format of a tensor in ggml.

    Attributes:
        name: Name in ggml.
        block_size: Number of weights per block.
        block_nbytes: Size of a block in bytes.
        decode: Kernel that decodes complete blocks to float32.
    """

    name: str
    block_size: int
    block_nbytes: int
    decode: Kernel


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, decode_f32),
    1: BlockType("F16", 1, 2, decode_f16),
    2: BlockType("Q4_0", 32, 18, decode_q4_0),
    3: BlockType("Q4_1", 32, 20, decode_q4_1),
    6: BlockType("Q5_0", 32, 22, decode_q5_0),
    7: BlockType("Q5_1", 32, 24, decode_q5_1),
    8: BlockType("Q8_0", 32, 34, decode_q8_0),
    10: BlockType("Q2_K", 256, 84, decode_q2_k),
    11: BlockType("Q3_K", 256, 110, decode_q3_k),
    12: BlockType("Q4_K", 256, 144, decode_q4_k),
    13: BlockType("Q5_K", 256, 176, decode_q5_k),
    14: BlockType("Q6_K", 256, 210, decode_q6_k),
    20: BlockType("IQ4_NL", 32, 18, decode_iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, decode_iq4_xs),
    30: BlockType("BF16", 1, 2, decode_bf16),
    39: BlockType("MXFP4", 32, 17, decode_mxfp4),
}
"""Storage formats by their number in a file (`ggml_type`)."""

UNREAD_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip
"""Names of the storage formats that are not read, for messages."""
