"""The MXFP4 source (gpt-oss): expert matrices of 4-bit floats with an 8-bit exponent per 32, decoded to bfloat16.

On disk, `X_blocks` is uint8 [experts, n, k / 32, 16] and `X_scales` is uint8 [experts, n, k / 32]. In memory, `X` is
[experts, k, n]: transposed, as in transformers' `convert_moe_packed_tensors`. All other tensors are bfloat16.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.codec.floats import FloatFormat
from qformat.codec.foreign.block_floats import MXFP4_BLOCK, decode_mxfp4_transposed
from qformat.converters.sources.encoded.decoding_source import BlockFloats, refuse_dtype
from qformat.converters.sources.source import Source, SourceTensor
from qformat.errors import Reason, SourceError

BLOCKS_SUFFIX = "_blocks"
SCALES_SUFFIX = "_scales"
_BLOCK_NBYTES = MXFP4_BLOCK // 2


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Stored codes and exponents of a tensor: `n_rows` rows of `n_groups` blocks for each expert."""

    blocks: SourceTensor
    scales: SourceTensor
    n_rows: int
    n_groups: int


class _Kept(threading.local):
    """Codes and exponents of the expert that a thread is decoding, read once."""

    def __init__(self) -> None:
        self.expert: tuple[str, int] | None = None
        self.blocks: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.scales: NDArray[np.uint8] = np.empty(0, np.uint8)


class Mxfp4(BlockFloats[_Encoded]):
    """A checkpoint with MXFP4 experts, read as bfloat16."""

    kind = "mxfp4"

    def __init__(self, stored: Source) -> None:
        super().__init__(stored)
        self._kept = _Kept()
        encoded = {
            name.removesuffix(BLOCKS_SUFFIX): _with_scales(stored, tensor)
            for name, tensor in stored.tensors.items()
            if name.endswith(BLOCKS_SUFFIX)
        }
        parts = {part.name for one in encoded.values() for part in (one.blocks, one.scales)}
        passed = {name: tensor for name, tensor in stored.tensors.items() if name not in parts}
        for name in encoded:
            if name in passed:
                raise SourceError(
                    Reason.DUPLICATE_TENSOR, stored.location / passed[name].file, "is also stored in MXFP4", tensor=name
                )
        decoded = {name: _decoded(name, one) for name, one in encoded.items()}
        self._decode(encoded, passed | decoded, mark=f"tensor's name ends in {BLOCKS_SUFFIX}")

    def _decode_into(self, encoded: _Encoded, start: int, out: NDArray[np.uint16]) -> None:
        n_columns = encoded.n_groups * MXFP4_BLOCK
        done = 0
        while done < out.size:
            row, skipped = divmod(start + done, encoded.n_rows)
            expert, column = divmod(row, n_columns)
            wanted = out.size - done
            n = min(-(-(skipped + wanted) // encoded.n_rows), n_columns - column)
            decoded = np.empty(n * encoded.n_rows, np.uint16)
            blocks, scales = self._read_expert(encoded, expert)
            decode_mxfp4_transposed(blocks, scales, encoded.n_rows, encoded.n_groups, column, column + n, decoded)
            part = decoded[skipped : skipped + wanted]
            out[done : done + part.size] = part
            done += part.size

    def _read_expert(self, encoded: _Encoded, expert: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        kept = self._kept
        if kept.expert != (encoded.blocks.name, expert):
            n_blocks = encoded.n_rows * encoded.n_groups
            kept.expert = None
            kept.blocks = np.empty(n_blocks * _BLOCK_NBYTES, np.uint8)
            kept.scales = np.empty(n_blocks, np.uint8)
            self.stored.read_into(encoded.blocks, expert * kept.blocks.size, kept.blocks.data)
            self.stored.read_into(encoded.scales, expert * kept.scales.size, kept.scales.data)
            kept.expert = (encoded.blocks.name, expert)
        return kept.blocks, kept.scales


def _with_scales(stored: Source, blocks: SourceTensor) -> _Encoded:
    path = stored.location / blocks.file
    scales = stored.tensors.get(blocks.name.removesuffix(BLOCKS_SUFFIX) + SCALES_SUFFIX)
    if scales is None:
        raise SourceError(Reason.MISSING_COMPONENT, path, "has no scales", tensor=blocks.name, field=SCALES_SUFFIX)
    for part in (blocks, scales):
        refuse_dtype(stored, part, {"U8"})
    if len(blocks.shape) != 4 or blocks.shape[-1] != _BLOCK_NBYTES or 0 in blocks.shape:
        raise SourceError(
            Reason.COMPONENT_SHAPE, path,
            f"shape {list(blocks.shape)}, expected [experts, rows, groups, {_BLOCK_NBYTES}]", tensor=blocks.name,
        )  # fmt: skip
    if scales.shape != blocks.shape[:-1]:
        raise SourceError(
            Reason.COMPONENT_SHAPE, stored.location / scales.file,
            f"shape {list(scales.shape)}, expected {list(blocks.shape[:-1])}", tensor=scales.name,
        )  # fmt: skip
    return _Encoded(blocks, scales, blocks.shape[1], blocks.shape[2])


def _decoded(name: str, encoded: _Encoded) -> SourceTensor:
    shape = (encoded.blocks.shape[0], encoded.n_groups * MXFP4_BLOCK, encoded.n_rows)
    return SourceTensor(name, FloatFormat.BF16.value, shape, encoded.blocks.file)
