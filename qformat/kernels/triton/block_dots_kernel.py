"""The kernel that sums over blocks: device code only (launched by `block_dots`).

    out[b] = sum over j < BLOCK_SIZE of values[b * BLOCK_SIZE + j] * codebook[code[b * BLOCK_SIZE + j]], in float32

A program reads LANES * ROUNDS words of codes, which are complete blocks, in rounds (LANES = 128, block size 64):

              ├──────────────────── round 0 ─────────────────────┤├─ round 1 ...
    packed    [ word 0 ][ word 1 ] ... [ word 7 ][ word 8 ] ...     int32: 8 codes, two per byte, high nibble first
    values    [ 0 - 7  ][ 8 - 15 ] ... [ 56-63  ][ 64-71  ] ...     16 bytes per lane in 16 bit
                lane 0    lane 1         lane 7    lane 8  ...
              ├────── summed by shuffles ──────┤
    out       [           block 0              ][ block 1  ...      float32
"""

from __future__ import annotations

import triton
import triton.language as tl

WORD = tl.constexpr(8)
"""Elements in a little-endian int32 word of packed codes, which a lane loads at once: 16 bytes of 16-bit values."""


@triton.jit(do_not_specialize=["n"])
def block_dots_kernel(
    values_ptr, packed_ptr, codebook_ptr, out_ptr, n,
    BLOCK_SIZE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Sum values times codebook entries over each block, in float32.

    Without ALIGNED, every program reads the codes byte by byte. With it, only a program with a partial tile does.
    Values past n count as 0.

    Args:
        values_ptr: Values [n], bf16, fp16 or fp32.
        packed_ptr: Packed codes, uint8 [ceil(n / 2)].
        codebook_ptr: Codebook, float32 [16].
        out_ptr: Sums, float32 [n_blocks].
        n: Number of values.
        BLOCK_SIZE: Number of elements per block.
        ALIGNED: Whether the address of the codes is a multiple of 16 bytes, so that words can be loaded.
        LANES: Threads per program.
        ROUNDS: Words per lane.
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
    """Sum a complete tile: each lane sums the 8 products of a word, then the lanes of a block add up by shuffles."""
    lane = tl.arange(0, LANES)
    element = tl.arange(0, WORD)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + tile // WORD
    # As in the dequantization kernel: with two copies of the codebook, the gather is one shuffle per weight.
    table = tl.load(codebook_ptr + (tl.arange(0, 32) & 15))
    table = tl.broadcast_to(table[None, :, None], [LANES // 32, 32, WORD])
    shift = (element // 2) * 8 + (1 - element % 2) * 4  # 4, 0, 12, 8, 20, 16, 28, 24: high nibble first
    words = ()  # collected by adding tuples, so that all loads come before the first use
    values = ()
    for r in tl.static_range(ROUNDS):
        words = words + (tl.load(words_ptr + r * LANES + lane, eviction_policy="evict_first"),)  # noqa: RUF005
        j = tile + r * LANES * WORD + lane[:, None] * WORD + element[None, :]
        values = values + (tl.load(values_ptr + j, eviction_policy="evict_first"),)  # noqa: RUF005
    LANES_OF_BLOCK: tl.constexpr = BLOCK_SIZE // WORD
    BLOCKS: tl.constexpr = LANES // LANES_OF_BLOCK
    for r in tl.static_range(ROUNDS):
        code = (words[r][:, None] >> shift[None, :]) & 31  # [LANES, 8]; bit 4 selects one of two equal copies
        weight = tl.reshape(tl.gather(table, tl.reshape(code, [LANES // 32, 32, WORD]), 1), [LANES, WORD])
        sums = tl.sum(values[r].to(tl.float32) * weight, axis=1)
        sums = tl.sum(tl.reshape(sums, [BLOCKS, LANES_OF_BLOCK]), axis=1)
        tl.store(out_ptr + tile // BLOCK_SIZE + r * BLOCKS + tl.arange(0, BLOCKS), sums)


@triton.jit
def _partial_tile(
    values_ptr, packed_ptr, codebook_ptr, out_ptr, tile, n,
    BLOCK_SIZE: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Sum a tile byte by byte with masks: for any n and alignment, without reading past the last code."""
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
