"""Compare an artifact with the checkpoint that it was made from: is it what the conversion must give, and how far off?

Both are streamed beside each other, chunk by chunk: every weight is encoded again and its codes and scales compared
byte for byte; what the artifact's own codes decode to, rounded to the weight's dtype (what a reader computes with),
gives the error figures; every kept tensor is compared bit for bit; every source tensor's digest with the manifest.

Of a tuned artifact the codes must be the same, the scales near those that encoding gives (`tuned_scales`), and kept
tensors may be others where the manifest names the source's digest: vectors, which is what norms are. A weight whose
codes were chosen on a text must be near the source (`chosen_codes`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Xxh3
from qformat.artifact.manifest import KeptRecord, PackedRecord, TensorRecord
from qformat.artifact.packed_arrays import BlockScales
from qformat.artifact.reading.reader import Artifact, open_artifact
from qformat.artifact.reading.regular_files import open_regular, read_exactly
from qformat.artifact.reading.verify import Finding
from qformat.codec import quant_state
from qformat.codec.cpu.blocks import COMPILING_TAKES_S, decode_into, decode_scales_into, encode_into, warm_up
from qformat.codec.cpu.error_sums import RunningErrors, count_codes
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.converters.compare.chosen_codes import count_far_scales, not_chosen
from qformat.converters.compare.comparison import Comparison, KeptComparison, PackedComparison
from qformat.converters.compare.differences import (
    count_different,
    count_different_codes,
    count_different_scales,
    count_wrong_scales,
)
from qformat.converters.compare.tuned_scales import count_too_far, scale_change
from qformat.converters.encode.task_writer import CHUNK_NBYTES
from qformat.converters.sources.open_source import open_source
from qformat.converters.sources.source import PackedWeight, Source, SourceTensor
from qformat.cores import usable_cores
from qformat.errors import ArtifactError, Interrupted, Reason

__all__ = ["Comparison", "compare"]


def compare(
    artifact: Path | str,
    source: Path | str | Source,
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
    on_compile: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare an artifact with its source. What does not fit is a finding, not an exception.

    workers: threads, by default one a core; any number gives the same result. on_progress (source bytes done) and
    on_compile (once, if kernels must be compiled) are for progress displays.
    Raises: ArtifactError and SourceError if one of the two cannot be opened.
    """
    opened = open_source(source) if isinstance(source, Path | str) else source
    with ExitStack() as stack:
        if opened is not source:
            stack.callback(opened.close)
        checked = stack.enter_context(open_artifact(artifact))
        shards = {
            name: stack.enter_context(open_regular(checked.path, name, error=ArtifactError))
            for name, record in checked.manifest.files.items()
            if record.header_xxh3 is not None
        }
        _warm_up(checked.manifest.tensors.values(), on_compile)
        return _Run(checked, shards, opened, on_progress).do(workers or usable_cores())


def _warm_up(records: Iterable[TensorRecord], on_compile: Callable[[], None]) -> None:
    """Load from the cache, or compile, what the comparison needs."""
    timer = threading.Timer(COMPILING_TAKES_S, on_compile)
    timer.daemon = True
    timer.start()
    n_elements, n_blocks = 127, 2  # a whole block and a partial one
    try:
        codes, scales = np.zeros(64, np.uint8), np.zeros(n_blocks, np.float32)
        nested, table = np.zeros(1, np.float32), np.zeros(256, np.float32)
        decode_scales_into(codes[:n_blocks], nested, table, np.float32(0), scales)
        for float_format in {record.layout.float_format for record in records if isinstance(record, PackedRecord)}:
            warm_up(float_format)
            raw: Raw = np.zeros(n_elements, float_format.raw_dtype)
            decode_into(codes, scales, n_elements=n_elements, block_size=64, float_format=float_format, out=raw)
            RunningErrors(float_format).add(raw, raw)
        count_codes(codes, n_elements=n_elements)
    finally:
        timer.cancel()


class _Buffers(threading.local):
    """Scratch memory of one worker thread, made once."""

    def __init__(self) -> None:
        self.source = np.empty(CHUNK_NBYTES, np.uint8)
        self.stored = np.empty(CHUNK_NBYTES, np.uint8)
        self.decoded = np.empty(CHUNK_NBYTES, np.uint8)
        self.packed = np.empty(CHUNK_NBYTES // 4, np.uint8)
        self.absmax = np.empty(CHUNK_NBYTES // 2 // 32, np.float32)


_Compared = tuple[PackedComparison | KeptComparison | None, list[Finding]]


class _Run:
    """One comparison: a task a tensor, and what the tasks share.

    The artifact is read, not mapped: the pages of a mapped file would count as memory of the process.
    """

    def __init__(
        self, artifact: Artifact, shards: Mapping[str, int], source: Source, progress: Callable[[int], None]
    ) -> None:
        self._artifact = artifact
        self._shards = shards
        self._source = source
        self._progress = progress
        self._buffers = _Buffers()
        self._stopping = threading.Event()
        self._scale_change = scale_change(artifact.manifest.recipe)
        self._not_chosen = not_chosen(artifact.manifest.recipe)

    def do(self, workers: int) -> Comparison:
        records = self._artifact.manifest.tensors
        with ThreadPoolExecutor(workers, thread_name_prefix="qformat-compare") as pool:
            futures = [pool.submit(self._compare, name, record) for name, record in records.items()]
            try:
                compared = [future.result() for future in futures]
            except BaseException:
                self._stopping.set()
                pool.shutdown(cancel_futures=True)
                raise
        findings = [finding for _, found in compared for finding in found]
        for name, tensor in self._source.tensors.items():
            if name not in records:
                findings.append(self._source_finding(tensor, "is not in the artifact"))
                self._progress(tensor.nbytes)
        for name, weight in self._source.packed.items():
            if name not in records:
                missing = dataclasses.replace(weight.parts[Component.PACKED], name=name)
                findings.append(self._source_finding(missing, "is not in the artifact"))
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
            message = f"{self._source.location}: tensor {name!r}: is in the artifact, but not in this source"
            return None, [Finding(Reason.SOURCE_MISMATCH, self._source.location.name, message, name)]
        if isinstance(record, KeptRecord):
            dtype, shape = record.dtype, record.shape
        else:
            dtype, shape = record.layout.float_format.value, record.layout.shape
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            self._progress(tensor.nbytes)
            problem = f"{tensor.dtype} {list(tensor.shape)}, but the artifact was made from {dtype} {list(shape)}"
            return None, [self._source_finding(tensor, problem)]
        if isinstance(record, KeptRecord):
            return self._compare_kept(tensor, record)
        return self._compare_packed(tensor, record)

    def _compare_kept(self, tensor: SourceTensor, record: KeptRecord) -> _Compared:
        digest, n_wrong = Xxh3(), 0
        for offset, chunk in self._chunks(tensor, digest):
            stored = self._buffers.stored[: chunk.size]
            self._read_stored(tensor.name, offset, stored)
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
        wrong = f"{n_wrong} of {tensor.nbytes} bytes of this kept tensor are not the source's"
        if not named:
            return compared, [self._other_source(tensor, wrong)]
        if n_wrong and not tuned:
            return compared, [self._artifact_finding(Reason.SOURCE_MISMATCH, tensor.name, wrong)]
        return compared, []

    def _compare_adopted(self, name: str, record: PackedRecord, weight: PackedWeight) -> _Compared:
        """Compare a weight that the source has in 4 bit, too: codes and scales must be the same bytes."""
        file = weight.parts[Component.PACKED].file
        layout = record.layout
        tensor = SourceTensor(name, layout.float_format.value, layout.shape, file)
        self._progress(weight.nbytes)
        if weight.layout != layout:
            return None, [self._source_finding(tensor, f"{weight.layout}, but the artifact has {layout}")]
        stored, theirs = self._stored_scales(name, record), self._adopted_scales(weight)
        n_wrong_codes, errors, code_counts = 0, RunningErrors(layout.float_format), np.zeros(16, np.int64)
        n_at_once = CHUNK_NBYTES // layout.float_format.nbytes
        for start in range(0, layout.n_elements, n_at_once):
            n_elements = min(n_at_once, layout.n_elements - start)
            codes, expected = (
                buffer[: packed_nbytes(n_elements)] for buffer in (self._buffers.stored, self._buffers.packed)
            )
            self._read_stored(name, start // 2, codes)
            self._source.read_into(weight.parts[Component.PACKED], start // 2, expected.data)
            n_wrong_codes += count_different_codes(codes, expected)
            code_counts += count_codes(codes, n_elements=n_elements)
            reference = self._decode(theirs, expected, start, n_elements).copy()
            errors.add(reference, self._decode(stored, codes, start, n_elements))
        compared = PackedComparison(
            name=name,
            layout=layout,
            source_nbytes=weight.nbytes,
            nbytes=sum(self._artifact.located[name + part.value].entry.nbytes for part in record.components),
            errors=errors.sums(),
            code_counts=tuple(code_counts.tolist()),
            n_wrong_codes=n_wrong_codes,
            n_wrong_scales=count_different_scales(stored, theirs),
            source_named=None,
        )
        return compared, list(self._judge_packed(tensor, compared))

    def _compare_packed(self, tensor: SourceTensor, record: PackedRecord) -> _Compared:
        layout = record.layout
        float_format = layout.float_format
        stored = self._stored_scales(tensor.name, record)
        digest, errors = Xxh3(), RunningErrors(float_format)
        code_counts = np.zeros(16, np.int64)
        absmax = np.empty(layout.n_blocks, float_format.raw_dtype)
        n_wrong_codes, finite = 0, True
        for offset, chunk in self._chunks(tensor, digest):
            raw: Raw = chunk.view(float_format.raw_dtype)
            start = offset // float_format.nbytes
            codes = self._buffers.stored[: packed_nbytes(raw.size)]
            self._read_stored(tensor.name, start // 2, codes)
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
            nbytes=sum(self._artifact.located[tensor.name + part.value].entry.nbytes for part in record.components),
            errors=errors.sums(),
            code_counts=tuple(code_counts.tolist()),
            n_wrong_codes=n_wrong_codes if finite else None,
            n_wrong_scales=self._count_wrong_scales(stored, absmax, float_format) if finite else None,
            source_named=named,
            n_far_scales=count_far_scales(stored.scales(), stored.nested_absmax, widen(absmax, float_format))
            if chosen
            else None,
        )
        return compared, list(self._judge_packed(tensor, compared))

    def _decode(self, stored: BlockScales, codes: NDArray[np.uint8], start: int, n_elements: int) -> Raw:
        """Decode codes that begin at element `start` as a reader does, into scratch memory."""
        float_format = stored.state.float_format
        out = self._buffers.decoded[: n_elements * float_format.nbytes].view(float_format.raw_dtype)
        stored.with_codes(codes, first_block=start // stored.state.block_size).decode_into(out)
        return out

    def _judge_packed(self, tensor: SourceTensor, compared: PackedComparison) -> Iterator[Finding]:
        """Yield what is wrong. With another source, wrong codes say nothing more: they are counted in one finding."""
        n_weights = compared.layout.n_elements
        wrong = "the source has values that are not finite and cannot be encoded"
        if compared.n_wrong_codes is not None:
            wrong = (
                f"{compared.n_wrong_codes} of {n_weights} codes and {compared.n_wrong_scales} of the scales are not "
                f"what encoding the source gives{self._allowed()}"
            )
        if compared.n_far_scales is not None:
            wrong = (
                f"its codes were chosen on a text, but {compared.n_far_scales} of {compared.layout.n_blocks} scales "
                f"are far from the source's, or the relative RMS error of {compared.errors.relative_rms or 0:.1%} is"
            )
        if compared.source_named is False:
            yield self._other_source(tensor, wrong)
        elif compared.n_wrong_codes is None:
            yield self._source_finding(tensor, wrong, Reason.NONFINITE_WEIGHT)
        elif not compared.holds:
            yield self._artifact_finding(Reason.CODES_MISMATCH, tensor.name, wrong)
        if compared.n_wrong_codes is not None and not compared.errors.finite:
            problem = "some codes decode to values that are not finite"
            yield self._artifact_finding(Reason.NONFINITE_WEIGHT, tensor.name, problem)

    def _count_wrong_scales(self, stored: BlockScales, absmax: Raw, float_format: FloatFormat) -> int:
        """Return how many numbers of the scales are not what absmax values [n_blocks] of the source give or allow."""
        if self._scale_change is None:
            return count_wrong_scales(stored, absmax, float_format)
        return count_too_far(stored.scales(), stored.nested_absmax, widen(absmax, float_format), self._scale_change)

    def _stored_scales(self, name: str, record: PackedRecord) -> BlockScales:
        def read(part: Component) -> NDArray[np.uint8]:
            data = np.empty(self._artifact.located[name + part.value].entry.nbytes, np.uint8)
            self._read_stored(name + part.value, 0, data)
            return data

        state = quant_state.parse(read(Component.QUANT_STATE).tobytes(), path=self._artifact.path, tensor=name)
        return BlockScales.from_bytes(state, read)

    def _adopted_scales(self, weight: PackedWeight) -> BlockScales:
        def read(part: Component) -> NDArray[np.uint8]:
            data = np.empty(weight.parts[part].nbytes, np.uint8)
            self._source.read_into(weight.parts[part], 0, data.data)
            return data

        return BlockScales.from_bytes(weight.state, read)

    def _read_stored(self, name: str, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with bytes of a tensor of the artifact's shards, from its byte `offset` on."""
        where = self._artifact.located[name]
        path = self._artifact.path / where.shard
        read_exactly(self._shards[where.shard], where.entry.start + offset, out.data, path=path, error=ArtifactError)

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

    def _allowed(self) -> str:
        return "" if self._scale_change is None else f" (scales: within {self._scale_change:.0%} of it)"

    def _other_source(self, tensor: SourceTensor, wrong: str) -> Finding:
        return self._source_finding(
            tensor, f"is not the tensor that the artifact was made from (its XXH3-128 is another one); {wrong}"
        )

    def _source_finding(self, tensor: SourceTensor, problem: str, reason: Reason = Reason.SOURCE_MISMATCH) -> Finding:
        path = self._source.location / tensor.file
        return Finding(reason, tensor.file, f"{path}: tensor {tensor.name!r}: {problem}", tensor.name)

    def _artifact_finding(self, reason: Reason, name: str, problem: str) -> Finding:
        shard = self._artifact.located[name].shard
        path = self._artifact.path / shard
        return Finding(reason, shard, f"{path}: tensor {name!r}: {problem}. Convert the source again", name)
