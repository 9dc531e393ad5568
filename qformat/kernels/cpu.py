"""The operations on CPU tensors: numba decodes into a scratch buffer, torch multiplies (spec sections 4 and 5).

    packed   uint8     [ c0 c1 ][ c2 c3 ][ c4 c5 ] ...           two codes per byte, first element in the high nibble
    absmax   uint8     [ block 0 ][ block 1 ] ...                one per block_size elements
    nested   float32   [ blocks 0-255 ][ blocks 256-511 ] ...    one per 256 blocks

    w[j] = codebook[code[j]] * absmax of block j // block_size,  in float32, rounded once

Many rows of x (`DecodingProducts`): the weight [N, K] is decoded in bands of rows, and torch multiplies each band.

    rows    0 .. r-1   ── numba threads ──► scratch buffer [r, K], at most 32 MiB ── torch ──► out[:, 0:r]
    rows    r .. 2r-1  ── numba threads ──► the same buffer                       ── torch ──► out[:, r:2r]

At most 16 rows (`product`): numba multiplies with the codes as they are; no decoded weight is written to memory.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.cpu.block_dots import block_dots_into
from qformat.codec.cpu.blocks import decode_into, decode_nested_into
from qformat.codec.cpu.product import Product, unsupported
from qformat.codec.floats import FloatFormat
from qformat.kernels import openmp
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.implementations import MAX_ROWS_FROM_CODES
from qformat.kernels.packed_weight import PackedWeight

SCRATCH_NBYTES = 32 << 20
"""Largest scratch buffer of a thread, in bytes. Larger weights are decoded in bands of rows. glibc maps larger buffers
anew each time, and fresh pages cost five times as much as decoding (2,200 instead of 11,000 M weights/s)."""

FORMATS = {torch.bfloat16: FloatFormat.BF16, torch.float16: FloatFormat.F16, torch.float32: FloatFormat.F32}
"""Output format by torch dtype."""


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Decode a weight.

    Args:
        weight: Weight [N, K] to decode.
        out: Array for the result, [N, K], contiguous, in bf16, fp16 or fp32.
    """
    _decode_elements(weight, 0, weight.n_elements, out.view(-1))


class Scratch(threading.local):
    """A decoding buffer for each thread, as large as the largest piece that the thread has decoded so far."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def elements(self, n_elements: int, dtype: torch.dtype) -> Tensor:
        """Return elements of this thread's buffer; they are valid until the thread's next call.

        Args:
            n_elements: Number of elements.
            dtype: Dtype of the elements.
        """
        nbytes = n_elements * dtype.itemsize
        if self._buffer.nbytes < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffer[:nbytes].view(dtype)


class DecodingProducts:
    """Products that decode the weight in bands of rows that fit a scratch buffer and let torch multiply each band."""

    def __init__(self, scratch_nbytes: int = SCRATCH_NBYTES) -> None:
        self._scratch_nbytes = scratch_nbytes
        self._scratch = Scratch()

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Return x times the transposed weight plus the bias: [M, N] in x's dtype, in which it is also computed.

        Args:
            x: Activations [M, K].
            weight: Weight [N, K].
            bias: Bias [N], or None.
        """
        bands = self._bands(weight, x.dtype)
        if len(bands) == 1:
            return functional.linear(x, self._decoded_rows(weight, *bands[0], x.dtype), bias)
        out = x.new_empty((x.shape[0], weight.shape[0]))
        for first, last in bands:
            part = None if bias is None else bias[first:last]
            out[:, first:last] = functional.linear(x, self._decoded_rows(weight, first, last, x.dtype), part)
        return out

    def input_gradient(self, grad: Tensor, weight: PackedWeight) -> Tensor:
        """Return the gradient times the weight: [M, K] in the gradient's dtype, in which it is also computed.

        Args:
            grad: Gradient of the output [M, N].
            weight: Weight [N, K].
        """
        (first, last), *others = self._bands(weight, grad.dtype)
        out = torch.mm(grad[:, first:last], self._decoded_rows(weight, first, last, grad.dtype))
        for first, last in others:
            out.addmm_(grad[:, first:last], self._decoded_rows(weight, first, last, grad.dtype))
        return out

    def _bands(self, weight: PackedWeight, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Return ranges of rows that fit the scratch buffer. All except the last end at the end of a block."""
        return weight.bands(self._scratch_nbytes // dtype.itemsize)

    def _decoded_rows(self, weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
        k = weight.shape[1]
        out = self._scratch.elements((last - first) * k, dtype)
        _decode_elements(weight, first * k, last * k, out)
        return out.view(last - first, k)


def block_dots(values: Tensor, packed: Tensor, block_size: int, out: Tensor) -> None:
    """Sum values times codebook entries over each block: out[b] = sum over block b of values[j] * codebook[code[j]].

    Args:
        values: Values [n] in bf16 or fp32.
        packed: Packed codes, uint8 [ceil(n / 2)].
        block_size: Number of elements per block.
        out: Array for the sums, float32 [n_blocks].
    """
    block_dots_into(_raw(values), FORMATS[values.dtype], _array(packed), block_size=block_size, out=_array(out))


def product(x: Tensor, held: HeldWeight, out: Tensor) -> None:
    """Compute x times the transposed weight without writing a decoded weight to memory.

    Args:
        x: Activations [M, K], M at most 16.
        held: Weight [N, K].
        out: Tensor for the result, M * N elements in any shape, contiguous, in x's dtype.
    """
    ready = held.prepared(x.dtype, _prepared)
    n_threads = torch.get_num_threads()
    if ready.instructions == "bf16":  # addresses instead of numpy views, which would cost as much as a small product
        ready.at(x.data_ptr(), x.numel(), out.data_ptr(), team=openmp.run, n_threads=n_threads)
    else:
        ready(_raw(x), _raw(out), team=openmp.run, n_threads=n_threads)


def _prepared(weight: PackedWeight, dtype: torch.dtype) -> Product:
    nested_absmax, nested_quant_map = weight.nested_absmax, weight.nested_quant_map
    return Product(
        _array(weight.packed),
        _array(weight.absmax),
        None if nested_absmax is None else _array(nested_absmax),
        weight.nested_offset,
        shape=weight.shape,
        block_size=weight.block_size,
        float_format=FORMATS[dtype],
        nested_quant_map=DYNAMIC_MAP if nested_quant_map is None else _array(nested_quant_map),
    )


def product_unsupported(m: int, weight: PackedWeight, dtype: torch.dtype) -> str | None:
    """Return why `product` does not support these arguments, or None if it does.

    Args:
        m: Number of rows of x.
        weight: Weight [N, K].
        dtype: Dtype of x.
    """
    if dtype not in FORMATS:
        return f"x has dtype {dtype}, expected one of {', '.join(map(str, FORMATS))}"
    if m > MAX_ROWS_FROM_CODES:
        return f"x has {m} rows; with more than {MAX_ROWS_FROM_CODES}, decoding the weight is faster"
    return unsupported(weight.shape[1], weight.block_size, FORMATS[dtype])


def _decode_elements(weight: PackedWeight, start: int, stop: int, out: Tensor) -> None:
    """Decode the elements from `start` to `stop` into out [stop - start]. All blocks except the last are complete."""
    float_format = FORMATS[out.dtype]
    size = weight.block_size
    blocks = slice(start // size, -(-stop // size))
    packed = _array(weight.packed)[start // 2 : (stop + 1) // 2]
    if weight.nested_absmax is None or weight.nested_quant_map is None:
        decode_into(
            packed,
            _array(weight.absmax)[blocks],
            n_elements=stop - start,
            block_size=size,
            float_format=float_format,
            out=_raw(out),
            workers=torch.get_num_threads(),
        )
        return
    decode_nested_into(
        packed,
        _array(weight.absmax)[blocks],
        _array(weight.nested_absmax),
        np.float32(weight.nested_offset),
        n_elements=stop - start,
        block_size=size,
        float_format=float_format,
        out=_raw(out),
        nested_quant_map=_array(weight.nested_quant_map),
        first_block=blocks.start,
        workers=torch.get_num_threads(),
    )


def _raw(tensor: Tensor) -> NDArray[Any]:
    """Return a contiguous float tensor as raw elements [n]; 16-bit floats become uint16."""
    flat = tensor.detach().view(-1)
    return flat.numpy() if tensor.dtype == torch.float32 else flat.view(torch.uint16).numpy()


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().view(-1).numpy()
