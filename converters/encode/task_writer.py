"""Executes one task of a conversion: streams a tensor in chunks from its source to its places in the staged shards.

A task reads, encodes (or adopts, or copies), writes, and hashes both input and output. Only the absmax values, kept in
the source's dtype until their mean is known, grow with the size of a tensor.
"""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Xxh3, xxh3
from qformat.artifact.packed_arrays import PackedArrays
from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK
from qformat.codec.cpu.blocks import add_in_order, encode_absmax_into, encode_into
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import BLOCK_SIZES, block_count, packed_nbytes
from qformat.converters.encode.staged_shards import Progress, StagedShards
from qformat.converters.encode.tasks import AdoptedTask, KeptTask, PackedTask, Task, TensorDigests
from qformat.converters.sources.chunks import CHUNK_SIZES, read_chunks
from qformat.converters.sources.source import Source, SourceTensor
from qformat.errors import Option, Reason, SourceError

ABSMAX_CHUNK = 256 * NESTED_BLOCK_SIZE
"""Number of absmax values to encode at a time."""


class _Buffers(threading.local):
    """Scratch memory of one worker thread, allocated once."""

    def __init__(self, nbytes: int) -> None:
        self.source = np.empty(nbytes, np.uint8)
        self.packed = np.empty(nbytes // 4, np.uint8)
        self.absmax = np.empty(nbytes // 2 // min(BLOCK_SIZES), np.float32)


class TaskWriter:
    """Executes tasks in any thread.

    Once `stopping` is set, each running task raises Interrupted at its next chunk.
    """

    def __init__(self, source: Source, output: StagedShards, stopping: threading.Event, progress: Progress) -> None:
        self._source = source
        self._output = output
        self._stopping = stopping
        self._chunks = partial(read_chunks, source, stopping=stopping, progress=progress)
        self._buffers = _Buffers(CHUNK_SIZES.nbytes)

    def write(self, task: Task) -> TensorDigests:
        """Execute a task: write its tensor and return the digests.

        Raises:
            SourceError: The source is damaged, or the weight contains NaN or Inf.
            TargetError: The output cannot be written.
        """
        if isinstance(task, PackedTask):
            return self._encode(task)
        return self._adopt(task) if isinstance(task, AdoptedTask) else self._copy(task)

    def store(self, task: PackedTask, weight: PackedArrays, source_xxh3: str) -> TensorDigests:
        """Write all components of a weight that an encoder produced.

        Args:
            task: The task of the weight.
            weight: Packed codes and scales.
            source_xxh3: XXH3-128 of the source's bytes.

        Returns:
            The digests of the weight.

        Raises:
            TargetError: The output cannot be written.
        """
        components: dict[Component, str] = {}
        for part, data in weight.components().items():
            assert data.nbytes == task.places[part].nbytes
            self._output.write(task.places[part], 0, data)
            components[part] = xxh3(data)
        return TensorDigests(components, source_xxh3)

    def examine(self, task: PackedTask) -> str:
        """Return the XXH3-128 of a weight's source bytes after checking that all values are finite.

        Raises:
            SourceError: The weight contains NaN or Inf.
        """
        float_format = task.layout.float_format
        digest = Xxh3()
        for offset, chunk in self._chunks(task.source, self._buffers.source, digest=digest):
            raw: Raw = chunk.view(float_format.raw_dtype)
            if not np.isfinite(widen(raw, float_format)).all():
                raise nonfinite_error(self._source, task.source, offset // float_format.nbytes, raw, float_format)
        return digest.hexdigest()

    def digest_source(self, task: Task) -> str:
        """Return the XXH3-128 of a task's source bytes, as `write` computes it."""
        digest = Xxh3()
        parts = [task.source] if not isinstance(task, AdoptedTask) else _stored_parts(task)
        for tensor in parts:
            for _ in read_chunks(self._source, tensor, self._buffers.source, digest=digest, stopping=self._stopping):
                pass
        return digest.hexdigest()

    def _copy(self, task: KeptTask) -> TensorDigests:
        digest = Xxh3()
        for offset, chunk in self._chunks(task.source, self._buffers.source, digest=digest):
            self._output.write(task.place, offset, chunk)
        return TensorDigests({Component.PACKED: digest.hexdigest()}, digest.hexdigest())

    def _adopt(self, task: AdoptedTask) -> TensorDigests:
        """Copy every component except the quant_state, which is written anew with padding."""
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
            for offset, chunk in self._chunks(task.weight.parts[part], self._buffers.source, digest=source_digest):
                wanted = chunk[: place.nbytes - offset]  # codes stored in elements wider than a byte may have padding
                self._refuse_bad_part(task, part, offset, wanted)
                digest.update(wanted)
                self._output.write(place, offset, wanted)
            components[part] = digest.hexdigest()
        return TensorDigests(components, source_digest.hexdigest())

    def _refuse_bad_part(self, task: AdoptedTask, part: Component, offset: int, data: NDArray[np.uint8]) -> None:
        """Reject a codebook other than NF4, and scales and maps with NaN or Inf."""
        path = self._source.location / task.weight.parts[part].file
        name, label = task.source.name, part.label
        if part is Component.QUANT_MAP and data.tobytes() != NF4_CODEBOOK.astype("<f4").tobytes():
            raise SourceError(Reason.CODEBOOK, path, "is not the NF4 codebook", tensor=name, field=label)
        if part is Component.PACKED or (part is Component.ABSMAX and task.layout.double_quant):
            return
        values = data.view("<f4")
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            problem = f"entry {offset // 4 + index} is {values[index]}, expected a finite value"
            raise SourceError(Reason.NONFINITE_SCALE, path, problem, tensor=name, field=label)

    def _encode(self, task: PackedTask) -> TensorDigests:
        layout = task.layout
        source_digest, packed_digest = Xxh3(), Xxh3()
        absmax = np.empty(layout.n_blocks, layout.float_format.raw_dtype)
        for offset, chunk in self._chunks(task.source, self._buffers.source, digest=source_digest):
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
        """Encode the absmax values and write everything except the packed codes."""
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


def has_nonfinite(source: Source, task: PackedTask) -> bool:
    """Return whether a weight to encode contains NaN or Inf. Reads all of it.

    Args:
        source: The open source.
        task: The task of the weight.
    """
    float_format = task.layout.float_format
    buffer = np.empty(CHUNK_SIZES.nbytes, np.uint8)
    return any(
        not np.isfinite(widen(chunk.view(float_format.raw_dtype), float_format)).all()
        for _, chunk in read_chunks(source, task.source, buffer)
    )


def nonfinite_error(
    source: Source, tensor: SourceTensor, start: int, raw: Raw, float_format: FloatFormat
) -> SourceError:
    """Return the error that reports the first NaN or Inf of a chunk.

    Args:
        source: The source, for the message.
        tensor: The tensor that the chunk is part of.
        start: Index of the chunk's first element in the flattened tensor.
        raw: Elements of the chunk as raw bits.
        float_format: Format of the elements.
    """
    values = widen(raw, float_format)
    index = int(np.flatnonzero(~np.isfinite(values))[0])
    position = tuple(int(i) for i in np.unravel_index(start + index, tensor.shape))
    return SourceError(
        Reason.NONFINITE_WEIGHT,
        source.location / tensor.file,
        f"the weight at {list(position)} is {values[index]}, which NF4 cannot represent",
        tensor=tensor.name,
        next_step=("Keep tensors with NaN or Inf in 16 bit with ", Option("keep_nonfinite", True)),
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
