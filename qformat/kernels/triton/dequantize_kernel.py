"""The dequantization kernel: device code only (spec sections 4 and 5; launched by `dequantize`)."""

from __future__ import annotations

import triton
import triton.language as tl

WORD = tl.constexpr(8)
"""Weights in a little-endian int32 word of packed codes: what a lane loads at once, and 16 bytes of 16-bit output."""


@triton.jit(do_not_specialize=["n"])
def dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, n,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """out[j] = codebook[code[j]] * absmax[j // BLOCK_SIZE], multiplied in float32, rounded once to out's dtype.

    With NESTED, absmax[i] = nested_quant_map[absmax_code[i]] * nested_absmax[i // 256] + nested_offset in float32,
    product and sum rounded apart: launch with enable_fp_fusion=False.

    A program decodes LANES * ROUNDS words. TILES says which programs have all of them: "whole" (every program),
    "partial" (none may assume it; also for packed codes that are not 16-byte aligned), "mixed" (all but the last).
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
    """ROUNDS rounds of one word a lane: 128-byte loads and 512-byte stores a warp, all loads before the first store."""
    lane = tl.arange(0, LANES)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tile // WORD
    blocks_ptr = absmax_ptr + tile // BLOCK_SIZE
    # The codebook twice in 32 entries: then Triton gathers within a warp, one SHFL a weight and no shared memory.
    # With 16 entries it takes 2 SHFL and 16 layout converts (15 instructions a weight instead of 7).
    table = tl.load(codebook_ptr + (tl.arange(0, 32) & 15))
    table = tl.broadcast_to(table[None, :, None], [LANES // 32, 32, WORD])
    words = ()  # Triton has no lists and no unpacking: rounds are gathered by adding tuples
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
        code = (words[r][:, None] >> shift[None, :]) & 31  # [LANES, 8]; bit 4 picks a copy of the same entry
        value = tl.gather(table, tl.reshape(code, [LANES // 32, 32, WORD]), 1)
        out = (tl.reshape(value, [LANES, WORD]) * absmax[r][:, None]).to(out_ptr.dtype.element_ty)
        j = tile + r * LANES * WORD + tl.arange(0, LANES * WORD)
        tl.store(out_ptr + j, tl.reshape(out, [LANES * WORD]))


@triton.jit
def _partial_tile(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, codebook_ptr, out_ptr, tile, n,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """The same, a byte of codes at a time and masked: reads no byte past the last code, for any n and alignment."""
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
