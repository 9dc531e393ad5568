"""Decoding with the CPU's byte shuffles, as numba intrinsics in LLVM IR: what LLVM does not find by itself.

A 4-bit code is an index into the block's 16 values of 16 bits each. The 16 products are made and rounded in one
vector; then AVX-512 (BW) looks 32 codes up in one `vpermw`, AVX2 in two `vpshufb`, one for the low and one for the high
bytes. The results are those of `kernels.decode_bf16` and `kernels.decode_f16`, which serve every other CPU.

Scales must not be NaN (the reader refuses files in which they could be): rounding here does not look for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qformat.codec.codebooks import NF4_CODEBOOK
from qformat.codec.kernels import jit

AVX512_FEATURES = frozenset({"avx512f", "avx512bw"})
AVX2_FEATURES = frozenset({"avx2", "f16c"})

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_AT_ONCE = 32
"""Weights that one lookup decodes, from 16 bytes; every block size is a multiple."""

Table = Callable[[Any, Any], Any]
Lookup = Callable[[Any, Any, Any], Any]


def cpu_features() -> frozenset[str]:
    """Return LLVM's names of the features of this CPU."""
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def _vector(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)


def _constant(element: ir.Type, values: list[Any]) -> ir.Constant:
    return ir.Constant(_vector(element, len(values)), values)


def _shuffle(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(one, other, _constant(_I32, lanes))


def _call(builder: Any, name: str, result: ir.VectorType, *arguments: Any) -> Any:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _products(builder: Any, scale: Any) -> Any:
    """Codebook times scale: <16 x float>."""
    one_lane = builder.insert_element(ir.Constant(_vector(_F32, 16), ir.Undefined), scale, ir.Constant(_I32, 0))
    return builder.fmul(
        _constant(_F32, [float(value) for value in NF4_CODEBOOK]), _shuffle(builder, one_lane, one_lane, [0] * 16)
    )


def _bf16_table(builder: Any, scale: Any) -> Any:
    """The products rounded to bfloat16, ties to even: <16 x i16>."""
    bits = builder.bitcast(_products(builder, scale), _vector(_I32, 16))
    odd = builder.and_(builder.lshr(bits, _constant(_I32, [16] * 16)), _constant(_I32, [1] * 16))
    rounded = builder.add(bits, builder.add(odd, _constant(_I32, [0x7FFF] * 16)))
    return builder.trunc(builder.lshr(rounded, _constant(_I32, [16] * 16)), _vector(_I16, 16))


def _f16_table(builder: Any, scale: Any) -> Any:
    """The products rounded to float16 by the CPU, ties to even: <16 x i16>."""
    halves = builder.fptrunc(_products(builder, scale), _vector(ir.HalfType(), 16))
    return builder.bitcast(halves, _vector(_I16, 16))


def _lookup_avx512(builder: Any, table: Any, codes: Any) -> Any:
    """Look 16 bytes of codes up with `vpermw`. It reads 5 bits of an index, so the table stands there twice."""
    doubled = _shuffle(builder, table, table, list(range(16)) * 2)
    wide = builder.zext(codes, _vector(_I32, 16))
    high = builder.lshr(wide, _constant(_I32, [4] * 16))
    low = builder.shl(wide, _constant(_I32, [16] * 16))
    index = builder.bitcast(builder.or_(high, low), _vector(_I16, 32))
    return _call(builder, "llvm.x86.avx512.permvar.hi.512", _vector(_I16, 32), doubled, index)


def _lookup_avx2(builder: Any, table: Any, codes: Any) -> Any:
    """Look 16 bytes of codes up with two `vpshufb`, which shuffle within halves: both hold the whole table."""
    lower = builder.trunc(table, _vector(_I8, 16))
    upper = builder.trunc(builder.lshr(table, _constant(_I16, [8] * 16)), _vector(_I8, 16))
    low_bytes = _shuffle(builder, lower, lower, list(range(16)) * 2)
    high_bytes = _shuffle(builder, upper, upper, list(range(16)) * 2)
    high = builder.lshr(codes, _constant(_I8, [4] * 16))
    low = builder.and_(codes, _constant(_I8, [15] * 16))
    index = _shuffle(builder, high, low, [lane for i in range(16) for lane in (i, 16 + i)])
    found_low = _call(builder, "llvm.x86.avx2.pshuf.b", _vector(_I8, 32), low_bytes, index)
    found_high = _call(builder, "llvm.x86.avx2.pshuf.b", _vector(_I8, 32), high_bytes, index)
    pairs = _shuffle(builder, found_low, found_high, [lane for i in range(32) for lane in (i, 32 + i)])
    return builder.bitcast(pairs, _vector(_I16, 32))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: ir.VectorType) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


def _block_decoder(make_table: Table, lookup: Lookup) -> Any:
    """Return an intrinsic f(packed, start, size, scale, out): out[start:start+size] = one block, decoded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, start, size, scale, out = arguments
        packed_type, out_type = signature.args[0], signature.args[4]
        table = make_table(builder, scale)
        step = ir.Constant(size.type, _AT_ONCE)
        with cgutils.for_range_slice(builder, ir.Constant(size.type, 0), size, step) as (done, _):
            position = builder.add(start, done)
            first = builder.lshr(position, ir.Constant(position.type, 1))
            codes = builder.load(_pointer(context, builder, packed_type, packed, first, _vector(_I8, 16)))
            codes.align = 1
            found = lookup(builder, table, codes)
            stored = builder.store(found, _pointer(context, builder, out_type, out, position, found.type))
            stored.align = 2
        return context.get_dummy_value()

    def typed(typing_context: Any, packed: Any, start: Any, size: Any, scale: Any, out: Any) -> Any:
        return types.void(packed, start, size, scale, out), generate

    return intrinsic(typed)


_bf16_block_avx512 = _block_decoder(_bf16_table, _lookup_avx512)
_bf16_block_avx2 = _block_decoder(_bf16_table, _lookup_avx2)
_f16_block_avx512 = _block_decoder(_f16_table, _lookup_avx512)
_f16_block_avx2 = _block_decoder(_f16_table, _lookup_avx2)


@jit
def decode_bf16_avx512(packed, scales, block_size, out):
    """`kernels.decode_bf16` for whole blocks, with AVX-512."""
    for block in range(scales.size):
        _bf16_block_avx512(packed, block * block_size, block_size, scales[block], out)


@jit
def decode_bf16_avx2(packed, scales, block_size, out):
    """`kernels.decode_bf16` for whole blocks, with AVX2."""
    for block in range(scales.size):
        _bf16_block_avx2(packed, block * block_size, block_size, scales[block], out)


@jit
def decode_f16_avx512(packed, scales, block_size, out):
    """`kernels.decode_f16` for whole blocks, with AVX-512."""
    for block in range(scales.size):
        _f16_block_avx512(packed, block * block_size, block_size, scales[block], out)


@jit
def decode_f16_avx2(packed, scales, block_size, out):
    """`kernels.decode_f16` for whole blocks, with AVX2."""
    for block in range(scales.size):
        _f16_block_avx2(packed, block * block_size, block_size, scales[block], out)
