"""The FP8 source: E4M3 weights with one scale per block (DeepSeek-V3, Qwen3 FP8), decoded to bfloat16 while reading.

`X.weight` (F8_E4M3) is multiplied by `X.weight_scale_inv`, which has one scale per block of `weight_block_size`
elements, with partial blocks at the edges, or one scale for the whole tensor. The decoded model has neither these
scales nor those of activations. The result is the same as that of transformers' `Fp8Dequantize` if the blocks divide
the weight evenly.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.foreign.block_floats import E8M0, decode_e4m3
from qformat.converters.sources.encoded.decoding_source import BlockFloats, refuse_dtype
from qformat.converters.sources.source import Source, SourceTensor
from qformat.errors import Reason, SourceError
from qformat.names import CONFIG_NAME

SCALE_SUFFIX = "_scale_inv"
_ONE_SCALE_SUFFIX = "_scale"
_ACTIVATION_SUFFIXES = (".activation_scale", ".input_scale")
_WEIGHT_DTYPE = "F8_E4M3"
_SCALE_DTYPES = {"F32", "BF16", "F16", "F8_E8M0", "U8"}
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A stored weight, its scales, and the number of rows and columns of a block."""

    weight: SourceTensor
    scales: SourceTensor
    block: tuple[int, int]


class _Kept(threading.local):
    """Scales of the weight that a thread is decoding, read once."""

    def __init__(self) -> None:
        self.name = ""
        self.scales: NDArray[np.float32] = np.empty(0, np.float32)


class Fp8Blocks(BlockFloats[_Encoded]):
    """A checkpoint of 8-bit floats, read as bfloat16."""

    kind = "fp8"

    def __init__(self, stored: Source) -> None:
        super().__init__(stored)
        self._kept = _Kept()
        block = _block_size(stored)
        weights = [tensor for tensor in stored.tensors.values() if tensor.dtype == _WEIGHT_DTYPE]
        encoded = {tensor.name: _with_scales(stored, tensor, block) for tensor in weights}
        tensors = {
            name: SourceTensor(name, FloatFormat.BF16.value, tensor.shape, tensor.file) if name in encoded else tensor
            for name, tensor in stored.tensors.items()
            if not _is_scale(name, encoded)
        }
        self._decode(encoded, tensors, mark=f"tensor is {_WEIGHT_DTYPE}")

    def _decode_into(self, encoded: _Encoded, start: int, out: NDArray[np.uint16]) -> None:
        codes = np.empty(out.size, np.uint8)
        self.stored.read_into(encoded.weight, start, codes.data)
        rows, columns = _matrix(encoded.weight.shape)
        decode_e4m3(codes, start, rows, columns, *encoded.block, self._scales(encoded), out)

    def _scales(self, encoded: _Encoded) -> NDArray[np.float32]:
        if self._kept.name != encoded.scales.name:
            self._kept.scales = _widened(self.read_whole(encoded.scales), encoded.scales.dtype)
            self._kept.name = encoded.scales.name
        return self._kept.scales


def _is_scale(name: str, encoded: Collection[str]) -> bool:
    if name.endswith(_ACTIVATION_SUFFIXES):
        return True
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in encoded


def _block_size(stored: Source) -> tuple[int, int] | None:
    """Return the number of rows and columns of a block, or None for one scale per tensor."""
    quantization = stored.config["quantization_config"]
    assert isinstance(quantization, dict)
    size = quantization.get("weight_block_size", list(_DEFAULT_BLOCK))
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise SourceError(
            Reason.CONFIG_FIELD,
            stored.location / CONFIG_NAME,
            f"{size!r}, expected two sizes or null",
            field="quantization_config.weight_block_size",
        )
    rows, columns = size
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    return rows, columns


def _with_scales(stored: Source, tensor: SourceTensor, block: tuple[int, int] | None) -> _Encoded:
    path = stored.location / tensor.file
    scales = stored.tensors.get(tensor.name + SCALE_SUFFIX)
    if scales is None and (other := stored.tensors.get(tensor.name + _ONE_SCALE_SUFFIX)) is not None:
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE, stored.location / other.file,
            f"scales all of {tensor.name} or its rows, as AutoFP8, FBGEMM and compressed-tensors write it; only scales "
            f"of blocks, {tensor.name}{SCALE_SUFFIX}, can be read",
            tensor=other.name, next_step="Convert the original 16-bit checkpoint",
        )  # fmt: skip
    if scales is None:
        raise SourceError(
            Reason.MISSING_COMPONENT, path, f"is in {_WEIGHT_DTYPE} but has no scales", tensor=tensor.name,
            field=SCALE_SUFFIX.removeprefix("_"),
        )  # fmt: skip
    refuse_dtype(stored, scales, _SCALE_DTYPES)
    rows, columns = _matrix(tensor.shape)
    if math.prod(scales.shape) == 1:
        return _Encoded(tensor, scales, (max(rows, 1), max(columns, 1)))
    grid = (-(-rows // block[0]), -(-columns // block[1])) if block is not None else None
    if grid is None or scales.shape != (*tensor.shape[:-2], *grid):
        expected = f"{[*tensor.shape[:-2], *grid]} (blocks of {block})" if grid is not None else "one scale"
        raise SourceError(
            Reason.COMPONENT_SHAPE, stored.location / scales.file, f"shape {list(scales.shape)}, expected {expected}",
            tensor=scales.name,
        )  # fmt: skip
    assert block is not None
    return _Encoded(tensor, scales, block)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of rows and columns of the matrices that a tensor of any rank consists of."""
    columns = shape[-1] if shape else 1
    return (shape[-2] if len(shape) > 1 else 1), columns


def _widened(data: bytearray, dtype: str) -> NDArray[np.float32]:
    if dtype in {"F8_E8M0", "U8"}:
        exponents: NDArray[np.float32] = E8M0[np.frombuffer(data, np.uint8)]
        return exponents
    float_format = FloatFormat(dtype)
    raw: Raw = np.frombuffer(data, np.uint8).view(float_format.raw_dtype)
    return widen(raw, float_format)
