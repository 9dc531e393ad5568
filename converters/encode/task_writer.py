"""One task of a conversion: a tensor, streamed in chunks from its source to its places in the staged shards.

Read, encode (or adopt, or copy), write, and hash on both sides. What grows with a tensor is only its absmax, kept in
the source's own dtype until its mean is known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Xxh3, xxh3
from qformat.artifact.packed_arrays import PackedArrays
from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK
from qformat.codec.cpu.blocks import add_in_order, encode_absmax_into, encode_into
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.converters.encode.plan import AdoptedTask, KeptTask, PackedTask, Task, TensorDigests
from qformat.converters.encode.staged_shards import Progress, StagedShards
from qformat.converters.sources.source import Source, SourceTensor
from qformat.errors import Interrupted, Reason, SourceError

CHUNK_NBYTES = 4 * 2**20
"""Source bytes read at a time: its buffers stay in the L2 and L3 cache. A multiple of every block's size."""

ABSMAX_CHUNK = 256 * NESTED_BLOCK_SIZE
"""Absmax values encoded at a time."""


class _Buffers(threading.local):
    """Scratch memory of one worker thread, made once."""

    def __init__(self) -> None:
        self.source = np.empty(CHUNK_NBYTES, np.uint8)
        self.packed = np.empty(CHUNK_NBYTES // 4, np.uint8)
        self.absmax = np.empty(CHUNK_NBYTES // 2 // 32, np.float32)


class TaskWriter:
    """Does tasks, in any thread. `stopping`, once set, ends each of them at its next chunk with Interrupted."""

    def __init__(self, source: Source, output: StagedShards, stopping: threading.Event, progress: Progress) -> None:
        self._source = source
        self._output = output
        self._stopping = stopping
        self._progress = progress
        self._buffers = _Buffers()

    def write(self, task: Task) -> TensorDigests:
        """Write all that a task says. Raises SourceError, TargetError."""
        if isinstance(task, PackedTask):
            return self._encode(task)
        return self._adopt(task) if isinstance(task, AdoptedTask) else self._copy(task)

    def store(self, task: PackedTask, weight: PackedArrays, source_xxh3: str) -> TensorDigests:
        """Write all components of a weight that an encoder made."""
        components: dict[Component, str] = {}
        for part, data in weight.components().items():
            assert data.nbytes == task.places[part].nbytes
            self._output.write(task.places[part], 0, data)
            components[part] = xxh3(data)
        return TensorDigests(components, source_xxh3)

    def examine(self, task: PackedTask) -> str:
        """Return the XXH3-128 of a weight's source, all of which must be finite."""
        float_format = task.layout.float_format
        digest = Xxh3()
        for offset, chunk in self._chunks(task.source, digest):
            raw: Raw = chunk.view(float_format.raw_dtype)
            if not np.isfinite(widen(raw, float_format)).all():
                raise nonfinite_error(self._source, task.source, offset // float_format.nbytes, raw, float_format)
        return digest.hexdigest()

    def digest_source(self, task: Task) -> str:
        """Return the XXH3-128 of a task's source, as `write` would find it."""
        digest = Xxh3()
        parts = [task.source] if not isinstance(task, AdoptedTask) else _stored_parts(task)
        for tensor in parts:
            for offset in range(0, tensor.nbytes, CHUNK_NBYTES):
                chunk = self._buffers.source[: min(CHUNK_NBYTES, tensor.nbytes - offset)]
                self._source.read_into(tensor, offset, chunk.data)
                digest.update(chunk)
        return digest.hexdigest()

    def _copy(self, task: KeptTask) -> TensorDigests:
        digest = Xxh3()
        for offset, chunk in self._chunks(task.source, digest):
            self._output.write(task.place, offset, chunk)
        return TensorDigests({Component.PACKED: digest.hexdigest()}, digest.hexdigest())

    def _adopt(self, task: AdoptedTask) -> TensorDigests:
        """Copy every component; the quant_state alone is written anew, padded."""
        source_digest = Xxh3()
        components: dict[Component, str] = {}
        for part, place in task.places.items():
            digest = Xxh3()
            if part is Component.QUANT_STATE:
                state = np.frombuffer(task.weight.state.to_padded_json(), np.uint8)
                digest.update(state)
                self._output.write(place, 0, state)
                components[part] = digest.hexdigest()
                continue
            for offset, chunk in self._chunks(task.weight.parts[part], source_digest):
                wanted = chunk[: place.nbytes - offset]  # codes that were stored in wider elements may be longer
                self._refuse_bad_part(task, part, offset, wanted)
                digest.update(wanted)
                self._output.write(place, offset, wanted)
            components[part] = digest.hexdigest()
        return TensorDigests(components, source_digest.hexdigest())

    def _refuse_bad_part(self, task: AdoptedTask, part: Component, offset: int, data: NDArray[np.uint8]) -> None:
        """Refuse another codebook, and scales and maps that are not finite."""
        path = self._source.location / task.weight.parts[part].file
        name, label = task.source.name, part.label
        if part is Component.QUANT_MAP and data.tobytes() != NF4_CODEBOOK.astype("<f4").tobytes():
            raise SourceError(Reason.CODEBOOK, path, "is not the NF4 codebook", tensor=name, field=label)
        if part is Component.PACKED or (part is Component.ABSMAX and task.layout.double_quant):
            return
        values = data.view("<f4")
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            problem = f"{values[index]} at entry {offset // 4 + index}"
            raise SourceError(Reason.NONFINITE_SCALE, path, problem, tensor=name, field=label)

    def _encode(self, task: PackedTask) -> TensorDigests:
        layout = task.layout
        source_digest, packed_digest = Xxh3(), Xxh3()
        absmax = np.empty(layout.n_blocks, layout.float_format.raw_dtype)
        for offset, chunk in self._chunks(task.source, source_digest):
            raw: Raw = chunk.view(layout.float_format.raw_dtype)
            start = offset // layout.float_format.nbytes
            first_block = start // layout.block_size
            packed = self._buffers.packed[: packed_nbytes(raw.size)]
            scales = self._buffers.absmax[: block_count(raw.size, layout.block_size)]
            if not encode_into(raw, layout.float_format, block_size=layout.block_size, packed=packed, absmax=scales):
                raise nonfinite_error(self._source, task.source, start, raw, layout.float_format)
            absmax[first_block : first_block + scales.size] = narrow(scales, layout.float_format)
            packed_digest.update(packed)
            self._output.write(task.places[Component.PACKED], start // 2, packed)
        components = {Component.PACKED: packed_digest.hexdigest()}
        components |= self._write_scales(task, absmax)
        return TensorDigests(components, source_digest.hexdigest())

    def _write_scales(self, task: PackedTask, absmax: Raw) -> dict[Component, str]:
        """Encode the second level and write everything but the packed codes."""
        layout = task.layout
        if layout.double_quant:
            offset = _mean(absmax, layout.float_format)
            digests = self._write_nested_absmax(task, absmax, offset)
        else:
            offset = None
            digests = self._write_absmax(task, absmax)
        state = layout.state(nested_offset=None if offset is None else float(offset))
        constants: dict[Component, NDArray[np.generic]] = {
            Component.NESTED_QUANT_MAP: DYNAMIC_MAP,
            Component.QUANT_MAP: NF4_CODEBOOK,
            Component.QUANT_STATE: np.frombuffer(state.to_padded_json(), np.uint8),
        }
        for part, data in constants.items():
            if part in task.places:
                self._output.write(task.places[part], 0, data)
                digests[part] = xxh3(data)
        return digests

    def _write_absmax(self, task: PackedTask, absmax: Raw) -> dict[Component, str]:
        digest = Xxh3()
        for start in range(0, absmax.size, ABSMAX_CHUNK):
            values = widen(absmax[start : start + ABSMAX_CHUNK], task.layout.float_format)
            digest.update(values)
            self._output.write(task.places[Component.ABSMAX], start * values.itemsize, values)
        return {Component.ABSMAX: digest.hexdigest()}

    def _write_nested_absmax(self, task: PackedTask, absmax: Raw, offset: np.float32) -> dict[Component, str]:
        codes_digest, nested_digest = Xxh3(), Xxh3()
        for start in range(0, absmax.size, ABSMAX_CHUNK):
            values = widen(absmax[start : start + ABSMAX_CHUNK], task.layout.float_format)
            codes = np.empty(values.size, np.uint8)
            nested = np.empty(block_count(values.size, NESTED_BLOCK_SIZE), np.float32)
            encode_absmax_into(values, offset, codes=codes, nested_absmax=nested)
            codes_digest.update(codes)
            nested_digest.update(nested)
            self._output.write(task.places[Component.ABSMAX], start, codes)
            nested_start = start // NESTED_BLOCK_SIZE * nested.itemsize
            self._output.write(task.places[Component.NESTED_ABSMAX], nested_start, nested)
        return {
            Component.ABSMAX: codes_digest.hexdigest(),
            Component.NESTED_ABSMAX: nested_digest.hexdigest(),
        }

    def _chunks(self, tensor: SourceTensor, digest: Xxh3) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield (byte offset, bytes) of a source tensor, hashing as they pass. The bytes are scratch memory."""
        for offset in range(0, tensor.nbytes, CHUNK_NBYTES):
            if self._stopping.is_set():
                raise Interrupted
            chunk = self._buffers.source[: min(CHUNK_NBYTES, tensor.nbytes - offset)]
            self._source.read_into(tensor, offset, chunk.data)
            digest.update(chunk)
            yield offset, chunk
            self._progress(chunk.size)


def has_nonfinite(source: Source, task: PackedTask) -> bool:
    """Whether a weight to encode has an infinite or NaN element. Reads it."""
    float_format = task.layout.float_format
    buffer = np.empty(CHUNK_NBYTES, np.uint8)
    for offset in range(0, task.source.nbytes, CHUNK_NBYTES):
        chunk = buffer[: min(CHUNK_NBYTES, task.source.nbytes - offset)]
        source.read_into(task.source, offset, chunk.data)
        if not np.isfinite(widen(chunk.view(float_format.raw_dtype), float_format)).all():
            return True
    return False


def nonfinite_error(
    source: Source, tensor: SourceTensor, start: int, raw: Raw, float_format: FloatFormat
) -> SourceError:
    """Return the error that names the first infinite or NaN weight of a chunk that begins at element `start`."""
    values = widen(raw, float_format)
    index = int(np.flatnonzero(~np.isfinite(values))[0])
    position = tuple(int(i) for i in np.unravel_index(start + index, tensor.shape))
    return SourceError(
        Reason.NONFINITE_WEIGHT,
        source.location / tensor.file,
        f"{values[index]} at {list(position)}: a weight that is not finite cannot be encoded",
        tensor=tensor.name,
        next_step="Keep such tensors as they are with --keep-nonfinite",
    )


def _mean(absmax: Raw, float_format: FloatFormat) -> np.float32:
    """Return the mean, summed in float64 in index order (spec section 5.2)."""
    total = 0.0
    for start in range(0, absmax.size, ABSMAX_CHUNK):
        total = add_in_order(widen(absmax[start : start + ABSMAX_CHUNK], float_format), total)
    return np.float32(total / absmax.size)


def _stored_parts(task: AdoptedTask) -> list[SourceTensor]:
    """Return the parts of an adopted weight in the order in which they are copied."""
    return [task.weight.parts[part] for part in task.places if part in task.weight.parts]
