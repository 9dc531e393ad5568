"""Produces the new bytes of an exported tensor chunk by chunk: decoded, cast or copied.

Only the nested absmax values grow with the size of a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.manifest import KeptRecord, PackedRecord
from qformat.artifact.packed_arrays import BlockScales
from qformat.artifact.reading.shard_files import ShardFiles
from qformat.codec import quant_state
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nf4 import BLOCK_SIZES, block_count, packed_nbytes
from qformat.codec.quant_state import QuantState
from qformat.converters.decode.plan import ExportTask
from qformat.converters.decode.stored_parts import StoredPart, kept_part, packed_parts
from qformat.converters.sources.chunks import ChunkSizes

_LARGEST_FINITE = {FloatFormat.BF16: 3.3895e38, FloatFormat.F16: 65504.0, FloatFormat.F32: 3.4028e38}
"""Largest finite values, rounded down: values up to them cannot become infinite."""

_INFINITY_BITS = {FloatFormat.BF16: 0x7F80, FloatFormat.F16: 0x7C00}


class _Buffers(threading.local):
    """Scratch memory of one worker thread, allocated once."""

    def __init__(self, nbytes: int) -> None:
        self.out = np.empty(nbytes, np.uint8)
        self.packed = np.empty(nbytes // 4, np.uint8)
        self.scales = np.empty(nbytes // 2 // min(BLOCK_SIZES) * 4, np.uint8)


class TensorDecoder:
    """Produces the new bytes of tensors from the shards of an artifact, in any thread."""

    def __init__(self, shards: ShardFiles, target: FloatFormat, sizes: ChunkSizes) -> None:
        self._shards = shards
        self._target = target
        self._sizes = sizes
        self._buffers = _Buffers(sizes.nbytes)

    def chunks(self, task: ExportTask) -> Iterator[tuple[NDArray[np.generic], int]]:
        """Yield the tensor's new bytes in order, in scratch memory, with the number of overflowed values in each chunk.

        Raises:
            ArtifactError: A shard cannot be read, or, after the last chunk, a digest does not match.
        """
        if isinstance(task.record, PackedRecord):
            yield from self._decoded(task, task.record)
        elif task.action == "copy":
            yield from self._copied(task, task.record)
        else:
            yield from self._cast(task, task.record)

    def _copied(self, task: ExportTask, record: KeptRecord) -> Iterator[tuple[NDArray[np.generic], int]]:
        part = kept_part(self._shards, task.name, record)
        for offset in range(0, task.place.nbytes, self._sizes.nbytes):
            chunk = self._buffers.out[: min(self._sizes.nbytes, task.place.nbytes - offset)]
            part.read_into(chunk)
            yield chunk, 0
        part.check()

    def _cast(self, task: ExportTask, record: KeptRecord) -> Iterator[tuple[NDArray[np.generic], int]]:
        part = kept_part(self._shards, task.name, record)
        target, source = self._target, FloatFormat(record.dtype)
        n_elements = task.place.nbytes // target.nbytes
        step = min(self._sizes.cast_elements, self._sizes.nbytes // source.nbytes)
        for start in range(0, n_elements, step):
            count = min(step, n_elements - start)
            data = self._buffers.out[: count * source.nbytes]
            part.read_into(data)
            values = widen(data.view(source.raw_dtype), source)
            chunk = narrow(values, target)
            yield chunk, _count_infinite(chunk, target) - int(np.isinf(values).sum())
        part.check()

    def _decoded(self, task: ExportTask, record: PackedRecord) -> Iterator[tuple[NDArray[np.generic], int]]:
        target, layout = self._target, record.layout
        parts = packed_parts(self._shards, task.name, record)
        state, scales = self._read_small(task.name, parts)
        scale_nbytes = 1 if layout.double_quant else 4
        step = self._sizes.nbytes // target.nbytes
        for start in range(0, layout.n_elements, step):
            count = min(step, layout.n_elements - start)
            packed = self._buffers.packed[: packed_nbytes(count)]
            absmax = self._buffers.scales[: block_count(count, layout.block_size) * scale_nbytes]
            chunk: Raw = self._buffers.out[: count * target.nbytes].view(target.raw_dtype)
            parts[Component.PACKED].read_into(packed)
            parts[Component.ABSMAX].read_into(absmax)
            scales[Component.ABSMAX] = absmax
            run = BlockScales.from_bytes(state, scales.__getitem__, first_block=start // layout.block_size)
            run.with_codes(packed).decode_into(chunk, target)
            # The codebook's largest magnitude is 1, so decoded values never exceed the scale.
            yield chunk, 0 if run.largest_scale() <= _LARGEST_FINITE[target] else _count_infinite(chunk, target)
        parts[Component.PACKED].check()
        parts[Component.ABSMAX].check()

    def _read_small(
        self, name: str, parts: Mapping[Component, StoredPart]
    ) -> tuple[QuantState, dict[Component, NDArray[np.uint8]]]:
        """Read and check all components of a packed tensor except its codes and absmax."""
        streamed = {Component.PACKED, Component.ABSMAX}
        small = {part: source.read_all() for part, source in parts.items() if part not in streamed}
        state = quant_state.parse(small[Component.QUANT_STATE].tobytes(), path=self._shards.path_of(name), tensor=name)
        return state, small


def _count_infinite(raw: Raw, float_format: FloatFormat) -> int:
    if float_format is FloatFormat.F32:
        return int(np.isinf(raw).sum())
    magnitudes = raw.view(np.uint16) & np.uint16(0x7FFF)
    return int((magnitudes == _INFINITY_BITS[float_format]).sum())
