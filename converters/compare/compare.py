"""Compares an artifact with its source checkpoint: whether the conversion is correct, and how large its error is.

Both are streamed side by side, chunk by chunk. Every weight is encoded again, and its codes and scales are compared
byte for byte. The error figures come from the values that a reader gets: the artifact's codes, decoded and rounded to
the weight's dtype. Every kept tensor is compared bit for bit, and every source tensor's digest with the manifest.

In a tuned artifact, the codes must be the same, the scales near the encoded ones (`tuned_scales`), and kept vectors
(norms) may differ if the manifest records the source's digest. A weight whose codes were chosen on a text must be near
the source (`chosen_codes`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Xxh3
from qformat.artifact.manifest import KeptRecord, PackedRecord, TensorRecord
from qformat.artifact.packed_arrays import BlockScales
from qformat.artifact.reading.reader import Artifact, open_artifact
from qformat.artifact.reading.shard_files import ShardFiles
from qformat.artifact.reading.verify import Finding
from qformat.codec import quant_state
from qformat.codec.cpu.blocks import decode_into, decode_scales_into, encode_into, warm_up
from qformat.codec.cpu.compiling import telling_of_compilation
from qformat.codec.cpu.error_sums import RunningErrors, count_codes
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nf4 import BLOCK_SIZES, block_count, packed_nbytes
from qformat.converters.compare.chosen_codes import count_far_scales, not_chosen
from qformat.converters.compare.comparison import Comparison, KeptComparison, PackedComparison
from qformat.converters.compare.differences import (
    count_different,
    count_different_codes,
    count_different_scales,
    count_wrong_scales,
)
from qformat.converters.compare.judgement import Judgement
from qformat.converters.compare.tuned_scales import count_too_far, scale_change
from qformat.converters.sources.chunks import CHUNK_SIZES, ChunkSizes, read_chunks
from qformat.converters.sources.file_source import INDEX_WINS
from qformat.converters.sources.open_source import open_source
from qformat.converters.sources.source import PackedWeight, Source, SourceTensor
from qformat.converters.sources.wrapped.stripped_names import MEMBER, stripped
from qformat.cores import run_tasks, usable_cores

__all__ = ["Comparison", "compare"]


def compare(
    artifact: Path | str | Artifact,
    source: Path | str | Source,
    *,
    workers: int | None = None,
    sizes: ChunkSizes = CHUNK_SIZES,
    on_progress: Callable[[int], None] = lambda _: None,
    on_compile: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare an artifact with its source. A mismatch is reported as a finding and raises no exception.

    Args:
        artifact: Directory of the artifact, or the open artifact.
        source: Anything that `open_source` accepts, or an open source.
        workers: Number of threads. Defaults to one per usable core. Does not affect the result.
        sizes: Sizes of the chunks held in memory. They do not affect the result.
        on_progress: Called with the number of source bytes processed since the last call.
        on_compile: Called once if kernels must be compiled.

    Raises:
        ArtifactError: The artifact cannot be opened.
        SourceError: The source cannot be opened.
    """
    with ExitStack() as stack:
        checked = artifact if isinstance(artifact, Artifact) else stack.enter_context(open_artifact(artifact))
        if isinstance(source, Path | str):
            opened = open_source(source, index_wins=INDEX_WINS in checked.manifest.source)
            stack.callback(opened.close)
        else:
            opened = source
        if MEMBER in checked.manifest.source:
            opened = stripped(opened)
        shards = ShardFiles(checked.structure, stack)
        with telling_of_compilation(on_compile):
            _warm_up(checked.manifest.tensors.values())
        return _Run(checked, shards, opened, on_progress, sizes).do(workers or usable_cores())


def _warm_up(records: Iterable[TensorRecord]) -> None:
    """Load the kernels that the comparison needs from the cache, or compile them."""
    n_elements, n_blocks = 127, 2  # a full block and a partial one
    codes, scales = np.zeros(64, np.uint8), np.zeros(n_blocks, np.float32)
    nested, table = np.zeros(1, np.float32), np.zeros(256, np.float32)
    decode_scales_into(codes[:n_blocks], nested, table, np.float32(0), scales)
    for float_format in {record.layout.float_format for record in records if isinstance(record, PackedRecord)}:
        warm_up(float_format)
        raw: Raw = np.zeros(n_elements, float_format.raw_dtype)
        decode_into(codes, scales, n_elements=n_elements, block_size=64, float_format=float_format, out=raw)
        RunningErrors(float_format).add(raw, raw)
    count_codes(codes, n_elements=n_elements)


class _Buffers(threading.local):
    """Scratch memory of one worker thread, allocated once."""

    def __init__(self, nbytes: int) -> None:
        self.source = np.empty(nbytes, np.uint8)
        self.stored = np.empty(nbytes, np.uint8)
        self.decoded = np.empty(nbytes, np.uint8)
        self.packed = np.empty(nbytes // 4, np.uint8)
        self.absmax = np.empty(nbytes // 2 // min(BLOCK_SIZES), np.float32)


_Compared = tuple[PackedComparison | KeptComparison | None, list[Finding]]


class _Run:
    """One comparison: one task per tensor, and their shared state."""

    def __init__(
        self,
        artifact: Artifact,
        shards: ShardFiles,
        source: Source,
        progress: Callable[[int], None],
        sizes: ChunkSizes,
    ) -> None:
        self._artifact = artifact
        self._shards = shards
        self._source = source
        self._progress = progress
        self._sizes = sizes
        self._buffers = _Buffers(sizes.nbytes)
        self._stopping = threading.Event()
        self._chunks = partial(read_chunks, source, stopping=self._stopping, progress=progress)
        self._scale_change = scale_change(artifact.manifest.recipe)
        self._not_chosen = not_chosen(artifact.manifest.recipe)
        self._judgement = Judgement(shards, source.location, self._scale_change)

    def do(self, workers: int) -> Comparison:
        records = self._artifact.manifest.tensors
        compared = run_tasks(
            {name: (name, record) for name, record in records.items()},
            lambda task: self._compare(*task),
            workers=workers,
            thread_name="qformat-compare",
            stopping=self._stopping,
        ).values()
        findings = [finding for _, found in compared for finding in found]
        for name, tensor in self._source.tensors.items():
            if name not in records:
                findings.append(self._judgement.of_source(tensor, "is not in the artifact"))
                self._progress(tensor.nbytes)
        for name, weight in self._source.packed.items():
            if name not in records:
                missing = dataclasses.replace(weight.parts[Component.PACKED], name=name)
                findings.append(self._judgement.of_source(missing, "is not in the artifact"))
        n_kept = sum(isinstance(record, KeptRecord) for record in records.values())
        n_unknown = sum(isinstance(record, PackedRecord) and record.source_xxh3 is None for record in records.values())
        return Comparison(
            artifact=self._artifact.path,
            source=self._source.location,
            packed=tuple(tensor for tensor, _ in compared if isinstance(tensor, PackedComparison)),
            kept=tuple(tensor for tensor, _ in compared if isinstance(tensor, KeptComparison)),
            n_packed=len(records) - n_kept,
            n_kept=n_kept,
            n_source_digests=len(records) - n_unknown,
            scale_change=self._scale_change,
            findings=tuple(findings),
        )

    def _compare(self, name: str, record: TensorRecord) -> _Compared:
        tensor = self._source.tensors.get(name)
        if isinstance(record, PackedRecord) and (weight := self._source.packed.get(name)) is not None:
            return self._compare_adopted(name, record, weight)
        if tensor is None:
            return None, [self._judgement.of_absent(name)]
        if isinstance(record, KeptRecord):
            dtype, shape = record.dtype, record.shape
        else:
            dtype, shape = record.layout.float_format.value, record.layout.shape
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            self._progress(tensor.nbytes)
            problem = f"{tensor.dtype} {list(tensor.shape)}, but the artifact was made from {dtype} {list(shape)}"
            return None, [self._judgement.of_source(tensor, problem)]
        if isinstance(record, KeptRecord):
            return self._compare_kept(tensor, record)
        return self._compare_packed(tensor, record)

    def _compare_kept(self, tensor: SourceTensor, record: KeptRecord) -> _Compared:
        digest, n_wrong = Xxh3(), 0
        for offset, chunk in self._chunks(tensor, self._buffers.source, digest=digest):
            stored = self._buffers.stored[: chunk.size]
            self._shards.read_into(tensor.name, offset, stored)
            n_wrong += count_different(stored, chunk)
        named = digest.hexdigest() == (record.source_xxh3 or record.xxh3)
        tuned = record.source_xxh3 is not None and self._scale_change is not None and len(record.shape) == 1
        compared = KeptComparison(
            tensor.name,
            record.dtype,
            record.shape,
            record.reason,
            tensor.nbytes,
            n_wrong,
            source_named=named,
            tuned=tuned,
        )
        return compared, list(self._judgement.of_kept(tensor, compared))

    def _compare_adopted(self, name: str, record: PackedRecord, weight: PackedWeight) -> _Compared:
        """Compare a weight that is in 4 bit in the source too: codes and scales must be byte-identical."""
        file = weight.parts[Component.PACKED].file
        layout = record.layout
        tensor = SourceTensor(name, layout.float_format.value, layout.shape, file)
        self._progress(weight.nbytes)
        if weight.layout != layout:
            return None, [self._judgement.of_source(tensor, f"{weight.layout}, but the artifact has {layout}")]
        stored, theirs = self._stored_scales(name), self._adopted_scales(weight)
        n_wrong_codes, errors, code_counts = 0, RunningErrors(layout.float_format), np.zeros(16, np.int64)
        n_at_once = self._sizes.nbytes // layout.float_format.nbytes
        for start in range(0, layout.n_elements, n_at_once):
            n_elements = min(n_at_once, layout.n_elements - start)
            codes, expected = (
                buffer[: packed_nbytes(n_elements)] for buffer in (self._buffers.stored, self._buffers.packed)
            )
            self._shards.read_into(name, start // 2, codes)
            self._source.read_into(weight.parts[Component.PACKED], start // 2, expected.data)
            n_wrong_codes += count_different_codes(codes, expected)
            code_counts += count_codes(codes, n_elements=n_elements)
            reference = self._decode(theirs, expected, start, n_elements).copy()
            errors.add(reference, self._decode(stored, codes, start, n_elements))
        compared = PackedComparison(
            name=name,
            layout=layout,
            source_nbytes=weight.nbytes,
            nbytes=sum(self._shards.entry_of(name + part.value).nbytes for part in record.components),
            errors=errors.sums(),
            code_counts=tuple(code_counts.tolist()),
            n_wrong_codes=n_wrong_codes,
            n_wrong_scales=count_different_scales(stored, theirs),
            source_named=None,
        )
        return compared, list(self._judgement.of_packed(tensor, compared))

    def _compare_packed(self, tensor: SourceTensor, record: PackedRecord) -> _Compared:
        layout = record.layout
        float_format = layout.float_format
        stored = self._stored_scales(tensor.name)
        digest, errors = Xxh3(), RunningErrors(float_format)
        code_counts = np.zeros(16, np.int64)
        absmax = np.empty(layout.n_blocks, float_format.raw_dtype)
        n_wrong_codes, finite = 0, True
        for offset, chunk in self._chunks(tensor, self._buffers.source, digest=digest):
            raw: Raw = chunk.view(float_format.raw_dtype)
            start = offset // float_format.nbytes
            codes = self._buffers.stored[: packed_nbytes(raw.size)]
            self._shards.read_into(tensor.name, start // 2, codes)
            code_counts += count_codes(codes, n_elements=raw.size)
            errors.add(raw, self._decode(stored, codes, start, raw.size))
            expected = self._buffers.packed[: codes.size]
            scales = self._buffers.absmax[: block_count(raw.size, layout.block_size)]
            finite &= encode_into(raw, float_format, block_size=layout.block_size, packed=expected, absmax=scales)
            first_block = start // layout.block_size
            absmax[first_block : first_block + scales.size] = narrow(scales, float_format)
            n_wrong_codes += count_different_codes(codes, expected)
        named = None if record.source_xxh3 is None else digest.hexdigest() == record.source_xxh3
        chosen = self._not_chosen is not None and tensor.name not in self._not_chosen
        compared = PackedComparison(
            name=tensor.name,
            layout=layout,
            source_nbytes=tensor.nbytes,
            nbytes=sum(self._shards.entry_of(tensor.name + part.value).nbytes for part in record.components),
            errors=errors.sums(),
            code_counts=tuple(code_counts.tolist()),
            n_wrong_codes=n_wrong_codes if finite else None,
            n_wrong_scales=self._count_wrong_scales(stored, absmax, float_format) if finite else None,
            source_named=named,
            n_far_scales=count_far_scales(stored.scales(), stored.nested_absmax, widen(absmax, float_format))
            if chosen
            else None,
        )
        return compared, list(self._judgement.of_packed(tensor, compared))

    def _decode(self, stored: BlockScales, codes: NDArray[np.uint8], start: int, n_elements: int) -> Raw:
        """Decode codes that begin at element `start` into scratch memory, as a reader does."""
        float_format = stored.state.float_format
        out = self._buffers.decoded[: n_elements * float_format.nbytes].view(float_format.raw_dtype)
        stored.with_codes(codes, first_block=start // stored.state.block_size).decode_into(out)
        return out

    def _count_wrong_scales(self, stored: BlockScales, absmax: Raw, float_format: FloatFormat) -> int:
        """Return how many scale values are not what the source gives, or exceed the tolerance."""
        if self._scale_change is None:
            return count_wrong_scales(stored, absmax, float_format)
        return count_too_far(stored.scales(), stored.nested_absmax, widen(absmax, float_format), self._scale_change)

    def _stored_scales(self, name: str) -> BlockScales:
        def read(part: Component) -> NDArray[np.uint8]:
            return self._shards.read(name + part.value)

        state = quant_state.parse(read(Component.QUANT_STATE).tobytes(), path=self._artifact.path, tensor=name)
        return BlockScales.from_bytes(state, read)

    def _adopted_scales(self, weight: PackedWeight) -> BlockScales:
        def read(part: Component) -> NDArray[np.uint8]:
            data = np.empty(weight.parts[part].nbytes, np.uint8)
            self._source.read_into(weight.parts[part], 0, data.data)
            return data

        return BlockScales.from_bytes(weight.state, read)
