"""The kernel of sums over blocks: device code only (launched by `triton_block_dots`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def block_dots_kernel(
    values_ptr, packed_ptr, codebook_ptr, out_ptr, n,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out[b] = sum over j < BLOCK_SIZE of values[b * BLOCK_SIZE + j] * codebook[code], in float32.

    A program sums BLOCKS blocks; the values were just written by a matrix product and are read from the L2 cache once,
    so that bandwidth and not arithmetic is what counts. Values past n count as zero.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    j = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # [BLOCKS, BLOCK_SIZE]
    mask = j < n
    value = tl.load(values_ptr + j, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    byte = tl.load(packed_ptr + j // 2, mask=mask, other=0).to(tl.int32)
    code = (byte >> (4 - (j % 2).to(tl.int32) * 4)) & 15  # the first of a pair in the high nibble
    weight = tl.load(codebook_ptr + code, eviction_policy="evict_last")
    tl.store(out_ptr + block, tl.sum(value * weight, axis=1), mask=block * BLOCK_SIZE < n)
