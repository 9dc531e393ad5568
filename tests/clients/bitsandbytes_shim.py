"""Plugin of pytest: qformat's encoder, decoder and product take the place of bitsandbytes' 4-bit functions.

    python -m pytest -p tests.clients.bitsandbytes_shim tests/test_functional.py -k "TestQuantize4BitFunctional and nf4"

runs the tests that bitsandbytes wrote for its own functions. What qformat does not have (FP4, blocks of more than 256
elements, other devices, an output that is given) goes to bitsandbytes as before. The last line of the report counts the
calls of ours, so that a run that never reached them is noticed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional
from torch import Tensor

from qformat.codec import nf4
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.cpu import blocks
from qformat.codec.floats import FloatFormat
from qformat.codec.nested import NESTED_BLOCK_SIZE, encode_absmax
from qformat.kernels import ops
from qformat.kernels.packed_weight import PackedWeight

FORMATS = {torch.bfloat16: FloatFormat.BF16, torch.float16: FloatFormat.F16, torch.float32: FloatFormat.F32}
DEFAULT_BLOCK_SIZE = 64
CALLS = "calls of qformat: "

calls: Counter[str] = Counter()
theirs = {
    "quantize": functional.quantize_4bit,
    "dequantize": functional.dequantize_4bit,
    "matmul": bitsandbytes.matmul_4bit,
    "gemv": functional.gemv_4bit,
}


def pytest_configure() -> None:
    """Replace bitsandbytes' functions."""
    functional.quantize_4bit = quantize_4bit
    functional.dequantize_4bit = dequantize_4bit
    functional.gemv_4bit = gemv_4bit
    bitsandbytes.matmul_4bit = matmul_4bit
    # For inference, bitsandbytes repacks weights into a layout that is not that of the files.
    functional.has_avx512bf16 = lambda: False


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report how often our functions ran."""
    terminalreporter.write_line(CALLS + " ".join(f"{name}={count}" for name, count in sorted(calls.items())))


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> Any:
    """Encode as bitsandbytes' function of the same name does."""
    block_size = blocksize or DEFAULT_BLOCK_SIZE
    if not _is_ours(A, quant_type, block_size) or out is not None:
        return theirs["quantize"](A, absmax, out, blocksize, compress_statistics, quant_type, quant_storage)
    calls["encode"] += 1
    packed, scales = _encode(A, block_size)
    nested: dict[str, Any] = {"absmax": torch.from_numpy(scales)}
    if compress_statistics:
        encoded = encode_absmax(scales)
        second = functional.QuantState(
            absmax=torch.from_numpy(encoded.nested_absmax),
            code=torch.from_numpy(DYNAMIC_MAP.copy()),
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        offset = torch.tensor(float(encoded.offset), dtype=torch.float32)
        nested = {"absmax": torch.from_numpy(encoded.codes), "offset": offset, "state2": second}
    code = functional.get_4bit_type("nf4", device="cpu")
    state = functional.QuantState(
        shape=A.shape, dtype=A.dtype, blocksize=block_size, code=code, quant_type="nf4", **nested
    )
    return torch.from_numpy(packed).view(quant_storage).view(-1, 1), state


def dequantize_4bit(
    A: Tensor,
    quant_state: Any = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Decode as bitsandbytes' function of the same name does."""
    if not _state_is_ours(A, quant_state) or absmax is not None or out is not None:
        return theirs["dequantize"](A, quant_state, absmax, out, blocksize, quant_type)
    calls["decode"] += 1
    decoded = ops.dequantize_nf4(*_operands(A, quant_state), quant_state.dtype).view(quant_state.shape)
    return decoded.t() if A.shape[0] == 1 else decoded  # theirs transposes the result of a transposed argument


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: Any, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Multiply as bitsandbytes' function of the same name does."""
    if not _multiplies(A, quant_state) or out is not None:
        return theirs["matmul"](A, B, quant_state, out, bias)
    calls["product"] += 1
    return ops.linear_nf4(A, *_operands(B, quant_state), bias)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: Any = None,
) -> Tensor:
    """Multiply one row as bitsandbytes' function of the same name does."""
    if not _multiplies(A, state) or out is not None:
        return theirs["gemv"](A, B, out, transposed_A, transposed_B, state)
    calls["product"] += 1
    return ops.linear_nf4(A, *_operands(B, state), None)


def _is_ours(tensor: Tensor, quant_type: str, block_size: int) -> bool:
    known = quant_type == "nf4" and block_size in nf4.BLOCK_SIZES and tensor.dtype in FORMATS
    return known and tensor.device.type == "cpu"


def _state_is_ours(packed: Tensor, state: Any) -> bool:
    known = state is not None and state.quant_type == "nf4" and state.blocksize in nf4.BLOCK_SIZES
    return known and state.dtype in FORMATS and packed.device.type == "cpu"


def _multiplies(x: Tensor, state: Any) -> bool:
    fits = _state_is_ours(x, state) and len(state.shape) == 2 and x.shape[-1] == state.shape[1]
    return fits and x.dtype in FORMATS and x.numel() > 0


def _encode(tensor: Tensor, block_size: int) -> tuple[Any, Any]:
    values = tensor.detach().contiguous().view(-1)
    raw = values.numpy() if values.dtype is torch.float32 else values.view(torch.int16).numpy().view(np.uint16)
    packed = np.empty(nf4.packed_nbytes(raw.size), np.uint8)
    absmax = np.empty(nf4.block_count(raw.size, block_size), np.float32)
    finite = blocks.encode_into(raw, FORMATS[tensor.dtype], block_size=block_size, packed=packed, absmax=absmax)
    assert finite, "bitsandbytes' tests encode finite numbers only"
    return packed, absmax


def _operands(packed: Tensor, state: Any) -> tuple[Any, ...]:
    """Return what our operators take: the components and the shape, of which one row stands for other ranks than 2."""
    shape = tuple(state.shape) if len(state.shape) == 2 else (1, int(np.prod(tuple(state.shape))))
    codes = packed.contiguous().view(-1).view(torch.uint8)[: nf4.packed_nbytes(shape[0] * shape[1])]
    if state.nested:
        nested = (state.absmax, state.state2.absmax, state.state2.code.float(), float(state.offset))
        weight = PackedWeight(codes, *nested, state.blocksize, shape)
    else:
        weight = PackedWeight(codes, state.absmax.float(), None, None, 0.0, state.blocksize, shape)
    components = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_quant_map, weight.nested_offset)
    return (*components, weight.block_size, *weight.shape)
