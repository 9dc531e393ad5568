"""The operations on CPU tensors: numba decodes into a scratch buffer that is kept, torch multiplies."""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from qformat.codec import cpu
from qformat.codec.floats import FloatFormat
from qformat.kernels.packed_weight import PackedWeight

SCRATCH_NBYTES = 32 << 20
"""The most that one thread keeps to decode into; larger weights go through it in bands of rows. glibc maps larger
buffers anew each time, and fresh pages cost five times what decoding costs (2,200 against 11,000 M weights/s)."""

FORMATS = {torch.bfloat16: FloatFormat.BF16, torch.float16: FloatFormat.F16, torch.float32: FloatFormat.F32}

_of_thread = threading.local()


def dequantize(weight: PackedWeight, out: Tensor) -> None:
    """Decode a weight into `out` [N, K], contiguous, bf16, fp16 or fp32."""
    _decode_elements(weight, 0, weight.n_elements, out.view(-1))


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return x [M, K] times the weight's transpose plus bias [N], as [M, N] of x's dtype, in which it is computed."""
    bands = _bands(weight, x.dtype)
    if len(bands) == 1:
        return functional.linear(x, _decode_rows(weight, *bands[0], x.dtype), bias)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    for first, last in bands:
        part = None if bias is None else bias[first:last]
        out[:, first:last] = functional.linear(x, _decode_rows(weight, first, last, x.dtype), part)
    return out


def input_gradient(grad: Tensor, weight: PackedWeight) -> Tensor:
    """Return grad [M, N] times the weight, [M, K] of grad's dtype, in which it is computed."""
    (first, last), *others = _bands(weight, grad.dtype)
    out = torch.mm(grad[:, first:last], _decode_rows(weight, first, last, grad.dtype))
    for first, last in others:
        out.addmm_(grad[:, first:last], _decode_rows(weight, first, last, grad.dtype))
    return out


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return x [M, K] times the weight's transpose, [M, N], without decoding the weight to memory."""
    raise NotImplementedError


def product_unsupported(m: int, weight: PackedWeight, dtype: torch.dtype) -> str | None:
    """Return why `product` does not take x [m, K] of `dtype`, or None if it does."""
    return "not there yet"


def _bands(weight: PackedWeight, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Return ranges of rows that fit the scratch buffer and, but for the last, end at the end of a block."""
    n, k = weight.shape
    if weight.n_elements * dtype.itemsize <= SCRATCH_NBYTES:
        return [(0, n)]
    step = int(np.lcm(weight.block_size, k)) // k  # the fewest rows that hold whole blocks
    rows = max(step, SCRATCH_NBYTES // (k * dtype.itemsize) // step * step)
    return [(first, min(first + rows, n)) for first in range(0, n, rows)]


def _decode_rows(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    k = weight.shape[1]
    out = _scratch(dtype, (last - first) * k)
    _decode_elements(weight, first * k, last * k, out)
    return out.view(last - first, k)


def _scratch(dtype: torch.dtype, n_elements: int) -> Tensor:
    """Return n elements of this thread's scratch buffer, valid until the next call in the thread."""
    kept: Tensor | None = getattr(_of_thread, "scratch", None)
    nbytes = n_elements * dtype.itemsize
    if kept is None or kept.nbytes < nbytes:
        kept = _of_thread.scratch = torch.empty(nbytes, dtype=torch.uint8)
    return kept[:nbytes].view(dtype)


def _decode_elements(weight: PackedWeight, start: int, stop: int, out: Tensor) -> None:
    """Decode elements start to stop, the first of a block to the last of one or of the weight, into out [stop - start]."""
    float_format = FORMATS[out.dtype]
    size = weight.block_size
    blocks = slice(start // size, -(-stop // size))
    packed = _array(weight.packed)[start // 2 : (stop + 1) // 2]
    raw = out if float_format is FloatFormat.F32 else out.view(torch.uint16)
    if weight.nested_absmax is None or weight.nested_quant_map is None:
        cpu.decode_into(
            packed,
            _array(weight.absmax)[blocks],
            n_elements=stop - start,
            block_size=size,
            float_format=float_format,
            out=raw.numpy(),
            workers=torch.get_num_threads(),
        )
        return
    cpu.decode_nested_into(
        packed,
        _array(weight.absmax)[blocks],
        _array(weight.nested_absmax),
        np.float32(weight.nested_offset),
        n_elements=stop - start,
        block_size=size,
        float_format=float_format,
        out=raw.numpy(),
        nested_quant_map=_array(weight.nested_quant_map),
        first_block=blocks.start,
        workers=torch.get_num_threads(),
    )


def _array(tensor: Tensor) -> NDArray[np.generic]:
    return tensor.detach().view(-1).numpy()
