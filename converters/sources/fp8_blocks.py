"""The fp8 source: E4M3 weights with a scale for each block (DeepSeek-V3, Qwen3 FP8), decoded to bfloat16 in the stream.

`X.weight` (F8_E4M3) is multiplied by `X.weight_scale_inv`, one scale for each block of `weight_block_size` elements,
the last ones possibly partial, or one for the whole tensor. The scales, and those of activations, are no tensors of
the decoded model. Source: transformers' `Fp8Dequantize`, which computes the same where the blocks divide the weight.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.foreign.block_floats import E8M0, decode_e4m3
from qformat.converters.sources.decoding_source import DecodingSource
from qformat.converters.sources.source import Source, SourceTensor
from qformat.errors import Reason, SourceError
from qformat.names import CONFIG_NAME

SCALE_SUFFIX = "_scale_inv"
_ACTIVATION_SUFFIXES = (".activation_scale", ".input_scale")
_WEIGHT_DTYPE = "F8_E4M3"
_SCALE_DTYPES = {"F32", "BF16", "F16", "F8_E8M0", "U8"}
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A weight as it is stored, its scales, and the size of a block in rows and columns."""

    weight: SourceTensor
    scales: SourceTensor
    block: tuple[int, int]


class _Kept(threading.local):
    """The scales of the weight that a thread decodes, read once."""

    def __init__(self) -> None:
        self.name = ""
        self.scales: NDArray[np.float32] = np.empty(0, np.float32)


class Fp8Blocks(DecodingSource):
    """A checkpoint of 8-bit floats, as bfloat16."""

    kind = "fp8"

    def __init__(self, stored: Source) -> None:
        super().__init__(stored)
        self._kept = _Kept()
        block = _block_size(stored)
        encoded = [tensor for tensor in stored.tensors.values() if tensor.dtype == _WEIGHT_DTYPE]
        self._encoded = {tensor.name: _with_scales(stored, tensor, block) for tensor in encoded}
        if not encoded:
            raise SourceError(
                Reason.CONFIG_FIELD,
                stored.location / CONFIG_NAME,
                f"says fp8, but no tensor is {_WEIGHT_DTYPE}",
                field="quantization_config",
            )
        self.tensors = {
            name: _decoded(tensor) if name in self._encoded else tensor
            for name, tensor in stored.tensors.items()
            if not self._is_scale(tensor)
        }

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with the decoded tensor's bytes from byte `offset` (a whole element) on."""
        encoded = self._encoded.get(tensor.name)
        if encoded is None:
            self.stored.read_into(tensor, offset, out)
            return
        raw = np.frombuffer(out, np.uint16)
        codes = np.empty(raw.size, np.uint8)
        self.stored.read_into(encoded.weight, offset // 2, codes.data)
        rows, columns = _matrix(encoded.weight.shape)
        decode_e4m3(codes, offset // 2, rows, columns, *encoded.block, self._scales(encoded), raw)

    def _scales(self, encoded: _Encoded) -> NDArray[np.float32]:
        if self._kept.name != encoded.scales.name:
            self._kept.scales = _widened(self.read_whole(encoded.scales), encoded.scales.dtype)
            self._kept.name = encoded.scales.name
        return self._kept.scales

    def _is_scale(self, tensor: SourceTensor) -> bool:
        if tensor.name.endswith(_ACTIVATION_SUFFIXES):
            return True
        return tensor.name.endswith(SCALE_SUFFIX) and tensor.name.removesuffix(SCALE_SUFFIX) in self._encoded


def _block_size(stored: Source) -> tuple[int, int] | None:
    """Return rows and columns of a block, None for one scale a tensor."""
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
    if scales is None:
        raise SourceError(
            Reason.MISSING_COMPONENT, path, f"{_WEIGHT_DTYPE} without its scales", tensor=tensor.name,
            field=SCALE_SUFFIX.removeprefix("_"),
        )  # fmt: skip
    if scales.dtype not in _SCALE_DTYPES:
        raise SourceError(
            Reason.COMPONENT_DTYPE, stored.location / scales.file,
            f"{scales.dtype}, expected one of {', '.join(sorted(_SCALE_DTYPES))}", tensor=scales.name,
        )  # fmt: skip
    rows, columns = _matrix(tensor.shape)
    if math.prod(scales.shape) == 1:
        return _Encoded(tensor, scales, (max(rows, 1), max(columns, 1)))
    grid = (-(-rows // block[0]), -(-columns // block[1])) if block is not None else None
    if grid is None or scales.shape != (*tensor.shape[:-2], *grid):
        expected = f"{[*tensor.shape[:-2], *grid]} (blocks of {block})" if grid is not None else "one scale"
        raise SourceError(
            Reason.COMPONENT_SHAPE, stored.location / scales.file, f"{list(scales.shape)}, expected {expected}",
            tensor=scales.name,
        )  # fmt: skip
    assert block is not None
    return _Encoded(tensor, scales, block)


def _decoded(tensor: SourceTensor) -> SourceTensor:
    return SourceTensor(tensor.name, FloatFormat.BF16.value, tensor.shape, tensor.file)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of the matrices that a tensor of any rank consists of."""
    columns = shape[-1] if shape else 1
    return (shape[-2] if len(shape) > 1 else 1), columns


def _widened(data: bytearray, dtype: str) -> NDArray[np.float32]:
    if dtype in {"F8_E8M0", "U8"}:
        exponents: NDArray[np.float32] = E8M0[np.frombuffer(data, np.uint8)]
        return exponents
    float_format = FloatFormat(dtype)
    raw: Raw = np.frombuffer(data, np.uint8).view(float_format.raw_dtype)
    return widen(raw, float_format)
