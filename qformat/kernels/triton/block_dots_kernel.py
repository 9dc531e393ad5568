"""The kernel of sums over blocks: device code only (launched by `block_dots`)."""

from __future__ import annotations

import triton
import triton.language as tl

WORD = tl.constexpr(8)
"""Weights in a little-endian int32 word of packed codes: what a lane loads at once, and 16 bytes of 16-bit values."""


@triton.jit(do_not_specialize=["n"])
def block_dots_kernel(
    values_ptr, packed_ptr, codebook_ptr, out_ptr, n,
    BLOCK_SIZE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """out[b] = sum over j < BLOCK_SIZE of values[b * BLOCK_SIZE + j] * codebook[code], in float32.

    A program takes LANES * ROUNDS words, which are whole blocks. ALIGNED: codes begin at a multiple of 16 bytes, so
    that words can be loaded; the last program, and all of them without it, go by bytes and count values past n as 0.
    """
    tile = tl.program_id(0).to(tl.int64) * (LANES * ROUNDS * WORD)  # first element
    if ALIGNED:
        if tile + LANES * ROUNDS * WORD <= n:
            _whole_tile(values_ptr, packed_ptr, codebook_ptr, out_ptr, tile, BLOCK_SIZE, LANES, ROUNDS)
        else:
            _partial_tile(values_ptr, packed_ptr, codebook_ptr, out_ptr, tile, n, BLOCK_SIZE, LANES, ROUNDS)
    else:
        _partial_tile(values_ptr, packed_ptr, codebook_ptr, out_ptr, tile, n, BLOCK_SIZE, LANES, ROUNDS)


@triton.jit
def _whole_tile(
    values_ptr, packed_ptr, codebook_ptr, out_ptr, tile,
    BLOCK_SIZE: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """A lane sums the 8 weights of a word, then the lanes of a block add up: shuffles within a warp."""
    lane = tl.arange(0, LANES)
    element = tl.arange(0, WORD)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tile // WORD
    # As in the dequantization: with the codebook twice, the gather is one shuffle a weight.
    table = tl.load(codebook_ptr + (tl.arange(0, 32) & 15))
    table = tl.broadcast_to(table[None, :, None], [LANES // 32, 32, WORD])
    shift = (element // 2) * 8 + (1 - element % 2) * 4  # 4, 0, 12, 8, 20, 16, 28, 24: high nibble first
    words = ()  # gathered by adding tuples: all loads before the first use
    values = ()
    for r in tl.static_range(ROUNDS):
        words = words + (tl.load(words_ptr + r * LANES + lane, eviction_policy="evict_first"),)  # noqa: RUF005
        j = tile + r * LANES * WORD + lane[:, None] * WORD + element[None, :]
        values = values + (tl.load(values_ptr + j, eviction_policy="evict_first"),)  # noqa: RUF005
    LANES_OF_BLOCK: tl.constexpr = BLOCK_SIZE // WORD
    BLOCKS: tl.constexpr = LANES // LANES_OF_BLOCK
    for r in tl.static_range(ROUNDS):
        code = (words[r][:, None] >> shift[None, :]) & 31  # [LANES, 8]; bit 4 picks a copy of the same entry
        weight = tl.reshape(tl.gather(table, tl.reshape(code, [LANES // 32, 32, WORD]), 1), [LANES, WORD])
        sums = tl.sum(values[r].to(tl.float32) * weight, axis=1)
        sums = tl.sum(tl.reshape(sums, [BLOCKS, LANES_OF_BLOCK]), axis=1)
        tl.store(out_ptr + tile // BLOCK_SIZE + r * BLOCKS + tl.arange(0, BLOCKS), sums)


@triton.jit
def _partial_tile(
    values_ptr, packed_ptr, codebook_ptr, out_ptr, tile, n,
    BLOCK_SIZE: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """The same, a byte of codes at a time and masked: reads no byte past the last code, for any n and alignment."""
    BLOCKS: tl.constexpr = LANES * WORD // BLOCK_SIZE
    for r in range(ROUNDS):
        block = tile // BLOCK_SIZE + r * BLOCKS + tl.arange(0, BLOCKS)
        j = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # [BLOCKS, BLOCK_SIZE]
        mask = j < n
        value = tl.load(values_ptr + j, mask=mask, other=0.0).to(tl.float32)
        byte = tl.load(packed_ptr + j // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> (4 - (j % 2).to(tl.int32) * 4)) & 15
        weight = tl.load(codebook_ptr + code)
        tl.store(out_ptr + block, tl.sum(value * weight, axis=1), mask=block * BLOCK_SIZE < n)
