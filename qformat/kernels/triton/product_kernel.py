"""The small-M product kernel: device code only (spec sections 4 and 5; launched by `product`).

    out[m, n] = sum over k of x[m, k] * W[n, k],    W[n, k] = codebook[code[n, k]] * scale of its block

A program computes ROWS rows of W for one split of K, in steps of 256 columns (4 segments):

              ├───────────────────── step ─────────────────────┤├─ next step ...
    W, row n  [ segment 0 ][ segment 1 ][ segment 2 ][ segment 3 ][ segment 4 ...    64 codes = 32 bytes = 8 words each
                lane 0       lane 1       lane 2       lane 3                        lane of the quad in a fragment
    segment   [ half a: words 0-3 ][ half b: words 4-7 ]                             one dot product per half
    absmax    one per segment (with block size 32: one per half)                     uint8, or float32 without nesting
    nested    float32, one per 256 blocks
    x [M, K]  the same 256 columns of all rows

How a weight gets from a nibble to a tensor core without passing through memory:

- A lane owns segments of 64 weights. For each scale (one per segment, or one per half with block size 32), it rounds
  scale * codebook to the 16 weights that can occur there and splits them into two byte planes in 8 registers (TABLE).
  Two byte permutes look up one plane of four weights in 8 entries each, a third selects by the code's top bit, and two
  more interleave the planes: 8 PRMT for four weights (LOOKUP).
- The order of k inside a dot product is free if x and W share it. Lane l % 4 of a tensor-core fragment takes segment l
  of the four. With runs of r neighbours per lane, column k = l * 64 + half * 32 + j * r + e of the matrix is position
  k = j * 4 * r + l * r + e in the dot product of `half`. Triton derives r (its kWidth) from the narrowest load that W
  depends on: 8 with the uint8 absmax of double quantization, 4 with a float32 absmax. With another r the result would
  be the same, but decoded weights would move between lanes (5.5-6.5 instructions per weight instead of 4.2).
- W is the left operand with 16 rows per fragment, and x^T is the right operand with 8 columns. For M <= 8, this takes
  half the tensor-core instructions of the usual order and no moves to arrange x (4.2 instructions per weight instead of
  5.0).
- With two warps per program, Triton uses `mma.sync` on every architecture. With four warps it uses wgmma on sm_90 (4.8
  instructions per weight) and tcgen05 on sm_100, which both need an operand in shared or tensor memory.

Inline PTX must be a pure function of its elements: Triton may evaluate it in any layout, so it cannot depend on lanes.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from qformat.codec.codebooks import NF4_CODEBOOK

SEGMENT = tl.constexpr(64)
"""Elements of a row that a lane owns: 32 bytes of codes."""

STEP = tl.constexpr(256)
"""Elements of a row per loop step: four segments, one for each lane of a fragment's quad."""


def _table_ptx(narrow: str) -> str:
    """Return PTX that computes the bytes of the 16 weights of a scale $8: $0-$3 low bytes of codes 0-15, $4-$7 high.

    Codes 0, 7 and 15 are -1, 0 and 1 and need no multiplication. (A zero loses the sign, which no product depends on.)
    """
    lines = [".reg .f32 f<16>;", ".reg .b32 p<8>;", "neg.f32 f0, $8;", "mov.f32 f7, 0f00000000;", "mov.f32 f15, $8;"]
    bits = NF4_CODEBOOK.view(np.uint32)
    lines += [f"mul.rn.f32 f{code}, $8, 0f{bits[code]:08X};" for code in range(16) if code not in (0, 7, 15)]
    lines += [f"cvt.rn.{narrow}.f32 p{i}, f{2 * i + 1}, f{2 * i};" for i in range(8)]
    lines += [f"prmt.b32 ${i}, p{2 * i}, p{2 * i + 1}, 0x6420;" for i in range(4)]
    lines += [f"prmt.b32 ${i + 4}, p{2 * i}, p{2 * i + 1}, 0x7531;" for i in range(4)]
    return "{ " + " ".join(lines) + " }"


def _lookup_ptx() -> str:
    """Return PTX that looks up the 8 weights of a word $4 in a table $5-$12: $0-$3, two each, first in the low half.

    i holds the low three bits of each code, an index into 8 bytes. s holds 4 * (the top bit) + position; it selects the
    byte that was looked up among codes 0-7 or among codes 8-15. A permute reads four nibbles, so the second half of the
    word is shifted down.
    """
    lines = [
        ".reg .b32 i, s, a, b, l, h;",
        "and.b32 i, $4, 0x77777777;",
        "shr.u32 s, $4, 1;",
        "lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;",  # (s & 0x44444444) | 0x32103210
    ]
    for first in (0, 2):
        if first:
            lines += ["shr.u32 i, i, 16;", "shr.u32 s, s, 16;"]
        lines += [
            "prmt.b32 a, $5, $6, i;", "prmt.b32 b, $7, $8, i;", "prmt.b32 l, a, b, s;",
            "prmt.b32 a, $9, $10, i;", "prmt.b32 b, $11, $12, i;", "prmt.b32 h, a, b, s;",
            f"prmt.b32 ${first}, l, h, 0x4051;", f"prmt.b32 ${first + 1}, l, h, 0x6273;",  # high nibble first
        ]  # fmt: skip
    return "{ " + " ".join(lines) + " }"


TABLE_BF16 = tl.constexpr(_table_ptx("bf16x2"))
TABLE_FP16 = tl.constexpr(_table_ptx("f16x2"))
LOOKUP = tl.constexpr(_lookup_ptx())
# "&" (early clobber): outputs are written before the last input is read.
TABLE_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,f")
LOOKUP_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r")


@triton.jit(do_not_specialize=["m", "n", "n_segments"])
def product_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, out_ptr, m, n, n_segments,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Compute out[s, m, n] = sum over split s of K of x[m, k] * W[n, k], with W in x's dtype, summed in float32.

    W is that of `dequantize_kernel`, except for the sign of zeros. The grid is (ceil(n / ROWS), splits).

    Args:
        x_ptr: Activations [m, K], bf16 or fp16.
        packed_ptr: Packed codes, uint8 [n * K / 2].
        absmax_ptr: uint8 [n_blocks] with NESTED, float32 [n_blocks] without.
        nested_absmax_ptr: float32 [ceil(n_blocks / 256)], unused without NESTED.
        nested_quant_map_ptr: float32 [256], unused without NESTED.
        nested_offset: Offset of the nested absmax, float32.
        out_ptr: Result [splits, m, n]: float32, or x's dtype if there is one split.
        m: Number of rows of x, at most BATCH.
        n: Number of rows of W.
        n_segments: K / 64.
        BLOCK_SIZE: Number of elements per block.
        NESTED: Whether the absmax values are themselves quantized.
        BATCH: Columns of the tensor-core operand that holds x: 8 or 16.
        ROWS: Rows of W per program.
        WARPS: Warps per program.
        TAIL: Whether n_segments is not a multiple of 4; the last split then ends with a masked step.
    """
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    steps = n_segments // 4
    steps_per_split = tl.cdiv(steps, tl.num_programs(1))
    start = tl.minimum(split * steps_per_split, steps)
    stop = tl.minimum(start + steps_per_split, steps)
    quad = tl.arange(0, 4)

    # Rows past the end read the last row and are never stored. `load_row` is the row at each position of the loads,
    # whose order of warps and registers differs from that of a fragment; `_fragment_rows` converts between the two.
    row = tl.minimum(first_row + tl.arange(0, ROWS), n - 1)
    load_row = tl.reshape(
        tl.permute(tl.reshape(tl.arange(0, ROWS), [ROWS // (WARPS * 16), WARPS, 2, 8]), (0, 2, 1, 3)), [ROWS]
    )
    load_row = tl.minimum(first_row + load_row, n - 1)
    segment = row[:, None] * n_segments + start * 4 + quad[None, :]  # [ROWS, 4]
    load_segment = load_row[:, None] * n_segments + start * 4 + quad[None, :]
    words_ptr = (
        packed_ptr.to(tl.pointer_type(tl.int32)) + load_segment[:, :, None] * 8 + quad[None, None, :]
    )  # [ROWS, 4, 4]
    batch = tl.arange(0, BATCH)
    in_batch = batch[:, None, None] < m
    x_ptrs = x_ptr + (batch[:, None, None] * n_segments + start * 4 + quad[None, :, None]) * SEGMENT  # [BATCH, 4, 1]
    x_ptrs = x_ptrs + tl.arange(0, 32)[None, None, :]  # [BATCH, 4, 32]

    sums = tl.zeros([ROWS, BATCH], dtype=tl.float32)
    for _ in range(start, stop):
        sums = _step(
            sums, x_ptrs, words_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, segment,
            in_batch, quad < 4, BLOCK_SIZE, NESTED, BATCH, ROWS, WARPS, False,
        )  # fmt: skip
        x_ptrs += STEP
        words_ptr += STEP // 8
        segment += 4
    if TAIL:  # noqa: SIM102 (one condition is the compiler's, the other the program's)
        if split == tl.num_programs(1) - 1:
            sums = _step(
                sums, x_ptrs, words_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, segment,
                in_batch, quad < n_segments % 4, BLOCK_SIZE, NESTED, BATCH, ROWS, WARPS, True,
            )  # fmt: skip
    out_row = first_row + tl.arange(0, ROWS)
    out_ptrs = out_ptr + split * m * n + batch[None, :] * n + out_row[:, None]  # [ROWS, BATCH]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=(batch[None, :] < m) & (out_row[:, None] < n))


@triton.jit(do_not_specialize=["splits", "size"])
def sum_splits_kernel(partial_ptr, out_ptr, splits, size, BLOCK: tl.constexpr):
    """Add the splits: out[i] = partial[0, i] + partial[1, i] + ..., in float32 and in this order: deterministic.

    Args:
        partial_ptr: Partial sums, float32 [splits, size].
        out_ptr: Result [size].
        splits: Number of splits.
        size: Number of elements of the result.
        BLOCK: Elements per program.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * size + i, mask=mask, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _step(
    sums, x_ptrs, words_ptr, absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, segment, in_batch,
    live, BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add the product of one step of four segments. `live` [4] marks those that exist (all, unless MASKED)."""
    # The two halves are loaded separately: if one tensor were split, decoded weights would pass through shared memory.
    # Both halves of a 32-byte sector come from one fetch; the second hits the L1 cache.
    if MASKED:
        words_a = tl.load(words_ptr, mask=live[None, :, None], other=0, eviction_policy="evict_first")
        words_b = tl.load(words_ptr + 4, mask=live[None, :, None], other=0, eviction_policy="evict_first")
        x_a = tl.load(x_ptrs, mask=in_batch & live[None, :, None], other=0.0)
        x_b = tl.load(x_ptrs + 32, mask=in_batch & live[None, :, None], other=0.0)
    else:
        words_a = tl.load(words_ptr, eviction_policy="evict_first")
        words_b = tl.load(words_ptr + 4, eviction_policy="evict_first")
        x_a = tl.load(x_ptrs, mask=in_batch, other=0.0)
        x_b = tl.load(x_ptrs + 32, mask=in_batch, other=0.0)
    words_a = _fragment_rows(words_a, ROWS, WARPS)
    words_b = _fragment_rows(words_b, ROWS, WARPS)
    if BLOCK_SIZE == 32:  # the two halves of a segment are two blocks
        a = _scale(
            absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, segment * 2, live, NESTED, MASKED
        )
        b = _scale(
            absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, segment * 2 + 1, live, NESTED, MASKED
        )
    else:
        block = segment // (BLOCK_SIZE // SEGMENT)
        a = _scale(absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, block, live, NESTED, MASKED)
        b = a
    RUN: tl.constexpr = 8 if NESTED else 4
    sums = tl.dot(_weights(words_a, a, x_ptrs.dtype.element_ty, ROWS, RUN), _product_order(x_a, BATCH, RUN), sums)
    return tl.dot(_weights(words_b, b, x_ptrs.dtype.element_ty, ROWS, RUN), _product_order(x_b, BATCH, RUN), sums)


@triton.jit
def _fragment_rows(words, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Reorder rows from the order of the loads (register, warp, lane) to that of fragments (warp, register, lane)."""
    words = tl.reshape(words, [ROWS // (WARPS * 16), 2, WARPS, 8, 4, 4])
    return tl.reshape(tl.permute(words, (0, 2, 1, 3, 4, 5)), [ROWS, 4, 4])


@triton.jit
def _product_order(x, BATCH: tl.constexpr, RUN: tl.constexpr):
    """Reorder x of one half: [BATCH, 4, 32] in matrix order (l, j, e) to [128, BATCH] in product order (j, l, e)."""
    return tl.reshape(tl.permute(tl.reshape(x, [BATCH, 4, 32 // RUN, RUN]), (2, 1, 3, 0)), [128, BATCH])


@triton.jit
def _scale(
    absmax_ptr, nested_absmax_ptr, nested_quant_map_ptr, nested_offset, block, live,
    NESTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the float32 scales [ROWS, 4] of blocks [ROWS, 4]. Blocks that are not `live` may lie past the end."""
    if MASKED:
        absmax = tl.load(absmax_ptr + block, mask=live[None, :], other=0)
        if NESTED:
            nested_absmax = tl.load(nested_absmax_ptr + (block >> 8), mask=live[None, :], other=0.0)
    else:
        absmax = tl.load(absmax_ptr + block)
        if NESTED:
            nested_absmax = tl.load(nested_absmax_ptr + (block >> 8))
    if NESTED:
        value = tl.load(nested_quant_map_ptr + absmax.to(tl.int32), eviction_policy="evict_last")
        absmax = value * nested_absmax + nested_offset
    return absmax


@triton.jit
def _weights(words, scale, dtype: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr):
    """Decode words [ROWS, 4, 4] of one half with scales [ROWS, 4] to weights [ROWS, 128] in product order (j, l, e)."""
    # Broadcasting the scale instead of its eight table registers takes one layout conversion instead of eight, and the
    # compiler merges the four equal tables of a segment.
    table_ptx: tl.constexpr = TABLE_FP16 if dtype == tl.float16 else TABLE_BF16
    t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
        table_ptx, TABLE_OPERANDS, [tl.broadcast_to(scale[:, :, None], [ROWS, 4, 4])],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    w0, w1, w2, w3 = tl.inline_asm_elementwise(
        LOOKUP, LOOKUP_OPERANDS, [words, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, l, j, 2, 2]: weights 0 1, 2 3, 4 5, 6 7 of a word
    low = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    weights = tl.reshape(tl.join(low, high), [ROWS, 4, 32 // RUN, RUN])  # [ROWS, l, j, e]
    return tl.reshape(tl.permute(weights, (0, 2, 1, 3)), [ROWS, 128])
