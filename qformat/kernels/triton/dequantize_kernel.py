"""The dequantization kernel: device code only (spec sections 4 and 5; launched by `dequantize`).

    scale[b] = nested_quant_map[absmax[b]] * nested_absmax[b // 256] + nested_offset     (float32, two roundings)
    out[j]   = codebook[code[j]] * scale[j // BLOCK_SIZE]                                (float32, then out's dtype)

A program decodes a tile of LANES * ROUNDS words in rounds (LANES = 128, block size 64):

              ├──────────────────── round 0 ─────────────────────┤├─ round 1 ...
    packed    [ word 0 ][ word 1 ] ... [ word 7 ][ word 8 ] ...     int32: 8 codes, two per byte, high nibble first
                lane 0    lane 1         lane 7    lane 8  ...
    absmax    [           block 0              ][ block 1  ...      uint8; the lanes of a block load the same byte
    nested    [ one float32 for the tile, which lies within 256 blocks ]
    out       [ 0 - 7  ][ 8 - 15 ] ... [ 56-63  ][ 64-71  ] ...     16 bytes per lane in 16 bit

    word      bits  31-28 27-24 23-20 19-16 15-12 11-8  7-4  3-0    (little-endian)
              code    6     7     4     5     2     3    0    1
"""

from __future__ import annotations

import triton
import triton.language as tl

WORD = tl.constexpr(8)
"""Elements in a little-endian int32 word of packed codes, which a lane loads at once: 16 bytes of 16-bit output."""


@triton.jit(do_not_specialize=["n"])
def dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, n,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Decode a weight: out[j] = codebook[code[j]] * scale[j // BLOCK_SIZE], rounded once to out's dtype.

    Launch with enable_fp_fusion=False: product and sum of the scale are rounded separately.

    Args:
        packed_ptr: Packed codes, uint8 [ceil(n / 2)].
        absmax_ptr: uint8 [n_blocks] with NESTED, float32 [n_blocks] without.
        nested_absmax_ptr: float32 [ceil(n_blocks / 256)], unused without NESTED.
        nested_quant_map_ptr: float32 [256], unused without NESTED.
        nested_offset: Offset of the nested absmax, float32.
        codebook_ptr: Codebook, float32 [16].
        out_ptr: Decoded weight [n], bf16, fp16 or fp32.
        n: Number of elements.
        BLOCK_SIZE: Number of elements per block.
        NESTED: Whether the absmax values are themselves quantized.
        TILES: Which programs have a complete tile: "whole" (all), "mixed" (all except the last) or "partial" (none can
            assume it; also used if the packed codes are not 16-byte aligned).
        LANES: Threads per program.
        ROUNDS: Words per lane.
    """
    tile = tl.program_id(0).to(tl.int64) * (LANES * ROUNDS * WORD)  # first element
    if TILES == "whole":
        _whole_tile(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, tile,
            BLOCK_SIZE, NESTED, LANES, ROUNDS,
        )  # fmt: skip
    elif TILES == "partial":
        _partial_tile(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, tile,
            n, BLOCK_SIZE, NESTED, LANES, ROUNDS,
        )  # fmt: skip
    elif tile + LANES * ROUNDS * WORD <= n:
        _whole_tile(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, tile,
            BLOCK_SIZE, NESTED, LANES, ROUNDS,
        )  # fmt: skip
    else:
        _partial_tile(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, tile,
            n, BLOCK_SIZE, NESTED, LANES, ROUNDS,
        )  # fmt: skip


@triton.jit
def _whole_tile(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, tile,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Decode a complete tile: 128-byte loads and 512-byte stores per warp, all loads before the first store."""
    lane = tl.arange(0, LANES)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tile // WORD
    blocks_ptr = absmax_ptr + tile // BLOCK_SIZE
    # Two copies of the codebook fill 32 entries. Triton then gathers within a warp: one SHFL per weight and no shared
    # memory. With 16 entries, it takes 2 SHFL and 16 layout conversions (15 instructions per weight instead of 7).
    table = tl.load(codebook_ptr + (tl.arange(0, 32) & 15))
    table = tl.broadcast_to(table[None, :, None], [LANES // 32, 32, WORD])
    words = ()  # Triton has neither lists nor unpacking, so rounds are collected by adding tuples
    scales = ()
    for r in tl.static_range(ROUNDS):
        words = words + (tl.load(words_ptr + r * LANES + lane, eviction_policy="evict_first"),)  # noqa: RUF005
        scales = scales + (tl.load(blocks_ptr + (r * LANES + lane) // (BLOCK_SIZE // WORD)),)  # noqa: RUF005
    if NESTED:
        nested_absmax = tl.load(nested_absmax_ptr + tile // (BLOCK_SIZE * 256))  # tiles divide BLOCK_SIZE * 256
        absmax = ()
        for r in tl.static_range(ROUNDS):
            value = tl.load(nested_quant_map_ptr + scales[r].to(tl.int32), eviction_policy="evict_last")
            absmax = absmax + (value * nested_absmax + nested_offset,)  # noqa: RUF005
    else:
        absmax = scales
    element = tl.arange(0, WORD)
    shift = (element // 2) * 8 + (1 - element % 2) * 4  # 4, 0, 12, 8, 20, 16, 28, 24: high nibble first
    for r in tl.static_range(ROUNDS):
        code = (words[r][:, None] >> shift[None, :]) & 31  # [LANES, 8]; bit 4 selects one of two equal copies
        value = tl.gather(table, tl.reshape(code, [LANES // 32, 32, WORD]), 1)
        out = (tl.reshape(value, [LANES, WORD]) * absmax[r][:, None]).to(out_ptr.dtype.element_ty)
        j = tile + r * LANES * WORD + tl.arange(0, LANES * WORD)
        tl.store(out_ptr + j, tl.reshape(out, [LANES * WORD]))


@triton.jit
def _partial_tile(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, tile, n,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Decode a tile byte by byte with masks: for any n and alignment, without reading past the last code."""
    for r in range(ROUNDS):
        j = tile + r * LANES * WORD + tl.arange(0, LANES * WORD)
        mask = j < n
        byte = tl.load(packed_ptr + j // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> (4 - (j % 2).to(tl.int32) * 4)) & 15
        absmax = tl.load(absmax_ptr + j // BLOCK_SIZE, mask=mask, other=0)
        if NESTED:
            nested_absmax = tl.load(nested_absmax_ptr + j // (BLOCK_SIZE * 256), mask=mask, other=0.0)
            absmax = tl.load(nested_quant_map_ptr + absmax.to(tl.int32)) * nested_absmax + nested_offset
        out = (tl.load(codebook_ptr + code) * absmax).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + j, out, mask=mask)
