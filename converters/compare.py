"""Compare an artifact with the checkpoint that it was made from: is it what the conversion must give, and how far off?

Both are streamed beside each other, chunk by chunk: every weight is encoded again and its codes and scales compared
byte for byte; what the artifact's own codes decode to, rounded to the weight's dtype (what a reader computes with),
gives the error figures; every kept tensor is compared bit for bit; every source tensor's digest with the manifest.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import PackedShape
from qformat.artifact.digests import Xxh3
from qformat.artifact.manifest import KeptRecord, PackedRecord, TensorRecord
from qformat.artifact.reader import Artifact, KeptTensor, PackedTensor, open_artifact
from qformat.artifact.verify import Finding
from qformat.codec import cpu
from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.error_sums import ErrorSums, RunningErrors, add_up, count_codes
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.converters.execute import ABSMAX_CHUNK, CHUNK_NBYTES
from qformat.converters.rules import module_path
from qformat.converters.safetensors_shards import SafetensorsShards
from qformat.converters.source import Source, SourceTensor
from qformat.cores import usable_cores
from qformat.errors import Interrupted, Reason

_NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True, slots=True)
class PackedComparison:
    """What the comparison found out about a packed weight.

    errors: of the values that a reader gets, in the weight's dtype. code_counts: how often each of the 16 codes
    occurs. n_wrong_codes, n_wrong_scales: how many are not what encoding the source gives, or None where the source
    cannot be encoded, since it is not finite. source_named: the source is the one whose digest the manifest has, or
    None if it has none. nbytes: of all components.
    """

    name: str
    layout: PackedShape
    source_nbytes: int
    nbytes: int
    errors: ErrorSums
    code_counts: tuple[int, ...]
    n_wrong_codes: int | None
    n_wrong_scales: int | None
    source_named: bool | None

    @property
    def exact(self) -> bool:
        """Whether codes and scales are what encoding the source gives."""
        return self.n_wrong_codes == 0 and self.n_wrong_scales == 0


@dataclass(frozen=True, slots=True)
class KeptComparison:
    """What the comparison found out about a tensor kept in 16 bit (or whatever it came in)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    keep_reason: str
    nbytes: int
    n_wrong_bytes: int
    source_named: bool

    @property
    def identical(self) -> bool:
        """Whether it is the source's tensor, bit for bit."""
        return self.n_wrong_bytes == 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare`; tensors in the order of the manifest, without those that could not be compared.

    n_packed, n_kept: how many of each the artifact has; n_source_digests: for how many of them the manifest has the
    digest of the source.
    """

    artifact: Path
    source: Path
    packed: tuple[PackedComparison, ...]
    kept: tuple[KeptComparison, ...]
    n_packed: int
    n_kept: int
    n_source_digests: int
    findings: tuple[Finding, ...]

    @property
    def good(self) -> bool:
        """Whether nothing is wrong: every code, scale and kept bit is what this source gives."""
        return not self.findings

    @property
    def overall(self) -> ErrorSums:
        """The errors of all packed weights together."""
        return add_up(tensor.errors for tensor in self.packed)

    @property
    def code_counts(self) -> tuple[int, ...]:
        """How often each of the 16 codes occurs in the artifact."""
        return tuple(sum(tensor.code_counts[code] for tensor in self.packed) for code in range(16))

    @property
    def n_exact(self) -> int:
        """How many packed weights have the codes and scales that encoding the source gives."""
        return sum(tensor.exact for tensor in self.packed)

    @property
    def n_identical(self) -> int:
        """How many kept tensors are the source's, bit for bit."""
        return sum(tensor.identical for tensor in self.kept)

    @property
    def n_source_named(self) -> int:
        """How many source tensors are those whose digest the manifest has."""
        named = sum(tensor.source_named is True for tensor in self.packed)
        return named + sum(tensor.source_named for tensor in self.kept)

    @property
    def source_nbytes(self) -> int:
        """Bytes of the compared tensors in the source."""
        return sum(tensor.source_nbytes for tensor in self.packed) + sum(tensor.nbytes for tensor in self.kept)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits that a packed weight takes, all components counted."""
        n_weights = sum(tensor.layout.n_elements for tensor in self.packed)
        return 8 * sum(tensor.nbytes for tensor in self.packed) / n_weights if n_weights else None

    @property
    def bits_per_parameter(self) -> float | None:
        """Bits that a parameter of the whole model takes, packed or kept."""
        n_parameters = sum(tensor.layout.n_elements for tensor in self.packed)
        n_parameters += sum(math.prod(tensor.shape) for tensor in self.kept)
        nbytes = sum(tensor.nbytes for tensor in self.packed) + sum(tensor.nbytes for tensor in self.kept)
        return 8 * nbytes / n_parameters if n_parameters else None

    def by_kind(self) -> dict[str, tuple[PackedComparison, ...]]:
        """Return the packed weights by kind of module (`q_proj`), in the order in which the kinds first occur."""
        groups: dict[str, list[PackedComparison]] = {}
        for tensor in self.packed:
            groups.setdefault(kind_of(tensor.name), []).append(tensor)
        return {kind: tuple(group) for kind, group in groups.items()}


def kind_of(name: str) -> str:
    """Return the kind of module that a tensor belongs to: the last part of its path that is no number."""
    parts = [part for part in module_path(name).split(".") if not _NUMBER.fullmatch(part)]
    return parts[-1] if parts else name


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to: the first number in its path."""
    return next((int(part) for part in name.split(".") if _NUMBER.fullmatch(part)), None)


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
    opened = SafetensorsShards(Path(source)) if isinstance(source, Path | str) else source
    try:
        with open_artifact(artifact) as packed:
            _warm_up(packed.manifest.tensors.values(), on_compile)
            return _Run(packed, opened, on_progress).do(workers or usable_cores())
    finally:
        if opened is not source:
            opened.close()


def _warm_up(records: Iterable[TensorRecord], on_compile: Callable[[], None]) -> None:
    """Load from the cache, or compile, what the comparison needs; views of a mapped file are read-only arrays."""
    timer = threading.Timer(cpu.COMPILING_TAKES_S, on_compile)
    timer.daemon = True
    timer.start()
    n_elements, n_blocks = 127, 2  # a whole block and a partial one
    try:
        codes, nested, table = np.zeros(64, np.uint8), np.zeros(1, np.float32), np.zeros(256, np.float32)
        for array in (codes, nested, table):
            array.setflags(write=False)
        scales = np.zeros(n_blocks, np.float32)
        cpu.decode_scales_into(codes[:n_blocks], nested, table, np.float32(0), scales)
        for float_format in {record.layout.float_format for record in records if isinstance(record, PackedRecord)}:
            cpu.warm_up(float_format)
            raw: Raw = np.zeros(n_elements, float_format.raw_dtype)
            cpu.decode_into(codes, scales, n_elements=n_elements, block_size=64, float_format=float_format, out=raw)
            RunningErrors(float_format).add(raw, raw)
        count_codes(codes, n_elements=n_elements)
    finally:
        timer.cancel()


class _Buffers(threading.local):
    """Scratch memory of one worker thread, made once."""

    def __init__(self) -> None:
        self.source = np.empty(CHUNK_NBYTES, np.uint8)
        self.decoded = np.empty(CHUNK_NBYTES, np.uint8)
        self.packed = np.empty(CHUNK_NBYTES // 4, np.uint8)
        self.absmax = np.empty(CHUNK_NBYTES // 2 // 32, np.float32)
        self.scales = np.empty(CHUNK_NBYTES // 2 // 32, np.float32)


_Compared = tuple[PackedComparison | KeptComparison | None, list[Finding]]


class _Run:
    """One comparison: a task a tensor, and what the tasks share."""

    def __init__(self, artifact: Artifact, source: Source, progress: Callable[[int], None]) -> None:
        self._artifact = artifact
        self._source = source
        self._progress = progress
        self._buffers = _Buffers()
        self._stopping = threading.Event()

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
            findings=tuple(findings),
        )

    def _compare(self, name: str, record: TensorRecord) -> _Compared:
        tensor = self._source.tensors.get(name)
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
        artifact_tensor = self._artifact[tensor.name]
        assert isinstance(artifact_tensor, KeptTensor)
        found = artifact_tensor.data.reshape(-1).view(np.uint8)
        digest, n_wrong = Xxh3(), 0
        for offset, chunk in self._chunks(tensor, digest):
            n_wrong += _count_different(found[offset : offset + chunk.size], chunk)
        named = digest.hexdigest() == record.xxh3
        compared = KeptComparison(
            tensor.name, record.dtype, record.shape, record.reason, tensor.nbytes, n_wrong, source_named=named
        )
        wrong = f"{n_wrong} of {tensor.nbytes} bytes of this kept tensor are not the source's"
        if not named:
            return compared, [self._other_source(tensor, wrong)]
        if n_wrong:
            return compared, [self._artifact_finding(Reason.SOURCE_MISMATCH, tensor.name, wrong)]
        return compared, []

    def _compare_packed(self, tensor: SourceTensor, record: PackedRecord) -> _Compared:
        artifact_tensor = self._artifact[tensor.name]
        assert isinstance(artifact_tensor, PackedTensor)
        layout = record.layout
        float_format = layout.float_format
        digest, errors = Xxh3(), RunningErrors(float_format)
        code_counts = np.zeros(16, np.int64)
        absmax = np.empty(layout.n_blocks, float_format.raw_dtype)
        n_wrong_codes, finite = 0, True
        for offset, chunk in self._chunks(tensor, digest):
            raw: Raw = chunk.view(float_format.raw_dtype)
            start = offset // float_format.nbytes
            codes = artifact_tensor.packed[start // 2 : start // 2 + packed_nbytes(raw.size)]
            code_counts += count_codes(codes, n_elements=raw.size)
            errors.add(raw, self._decode(artifact_tensor, codes, start, raw.size))
            expected = self._buffers.packed[: codes.size]
            scales = self._buffers.absmax[: block_count(raw.size, layout.block_size)]
            finite &= cpu.encode_into(raw, float_format, block_size=layout.block_size, packed=expected, absmax=scales)
            first_block = start // layout.block_size
            absmax[first_block : first_block + scales.size] = narrow(scales, float_format)
            n_wrong_codes += _count_different_codes(codes, expected)
        named = None if record.source_xxh3 is None else digest.hexdigest() == record.source_xxh3
        compared = PackedComparison(
            name=tensor.name,
            layout=layout,
            source_nbytes=tensor.nbytes,
            nbytes=sum(self._artifact.located[tensor.name + part.value].entry.nbytes for part in record.components),
            errors=errors.sums(),
            code_counts=tuple(code_counts.tolist()),
            n_wrong_codes=n_wrong_codes if finite else None,
            n_wrong_scales=_count_wrong_scales(artifact_tensor, absmax) if finite else None,
            source_named=named,
        )
        return compared, list(self._judge_packed(tensor, compared))

    def _decode(self, tensor: PackedTensor, codes: NDArray[np.uint8], start: int, n_elements: int) -> Raw:
        """Decode codes that begin at element `start` as a reader does, into scratch memory."""
        layout = tensor.layout
        blocks = slice(start // layout.block_size, block_count(start + n_elements, layout.block_size))
        scales = tensor.absmax[blocks]
        if tensor.nested_absmax is not None and tensor.nested_quant_map is not None:
            assert tensor.state.nested_offset is not None
            decoded = self._buffers.scales[: scales.size]
            cpu.decode_scales_into(
                scales,
                tensor.nested_absmax,
                tensor.nested_quant_map,
                np.float32(tensor.state.nested_offset),
                decoded,
                first_block=blocks.start,
            )
            scales = decoded
        out = self._buffers.decoded[: n_elements * layout.float_format.nbytes].view(layout.float_format.raw_dtype)
        cpu.decode_into(
            codes,
            scales,
            n_elements=n_elements,
            block_size=layout.block_size,
            float_format=layout.float_format,
            out=out,
        )
        return out

    def _judge_packed(self, tensor: SourceTensor, compared: PackedComparison) -> Iterator[Finding]:
        """Yield what is wrong. With another source, wrong codes say nothing more: they are counted in one finding."""
        n_weights = compared.layout.n_elements
        wrong = "the source has values that are not finite and cannot be encoded"
        if compared.n_wrong_codes is not None:
            wrong = (
                f"{compared.n_wrong_codes} of {n_weights} codes and {compared.n_wrong_scales} of the scales are not "
                "what encoding the source gives"
            )
        if compared.source_named is False:
            yield self._other_source(tensor, wrong)
        elif compared.n_wrong_codes is None:
            yield self._source_finding(tensor, wrong, Reason.NONFINITE_WEIGHT)
        elif not compared.exact:
            yield self._artifact_finding(Reason.CODES_MISMATCH, tensor.name, wrong)
        if compared.n_wrong_codes is not None and not compared.errors.finite:
            problem = "some codes decode to values that are not finite"
            yield self._artifact_finding(Reason.NONFINITE_WEIGHT, tensor.name, problem)

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


def _count_different(found: NDArray[Any], expected: NDArray[Any]) -> int:
    """Return in how many elements two arrays of equal size differ, bit for bit."""
    if found.dtype.kind == "f":
        found, expected = found.view(np.uint32), expected.view(np.uint32)
    return 0 if np.array_equal(found, expected) else int(np.count_nonzero(found != expected))


def _count_different_codes(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> int:
    """Return how many of the codes in packed bytes differ, the padding of an odd tensor counted as a code."""
    if np.array_equal(found, expected):
        return 0
    changed = found ^ expected
    return int(np.count_nonzero(changed >> 4) + np.count_nonzero(changed & 15))


def _count_wrong_scales(tensor: PackedTensor, absmax: Raw) -> int:
    """Return how many stored numbers of the scales are not what absmax values [n_blocks] of the source give."""
    float_format = tensor.layout.float_format
    nested_absmax, nested_map = tensor.nested_absmax, tensor.nested_quant_map
    if nested_absmax is None or nested_map is None:
        return sum(
            _count_different(tensor.absmax[start : start + values.size], values)
            for start, values in _absmax_chunks(absmax, float_format)
        )
    total = 0.0
    for _, values in _absmax_chunks(absmax, float_format):
        total = cpu.add_in_order(values, total)
    offset = np.float32(total / absmax.size if absmax.size else 0)
    n_wrong = int(tensor.state.nested_offset != float(offset)) + _count_different(nested_map, DYNAMIC_MAP)
    for start, values in _absmax_chunks(absmax, float_format):
        codes = np.empty(values.size, np.uint8)
        nested = np.empty(block_count(values.size, NESTED_BLOCK_SIZE), np.float32)
        cpu.encode_absmax_into(values, offset, codes=codes, nested_absmax=nested)
        group = start // NESTED_BLOCK_SIZE
        n_wrong += _count_different(tensor.absmax[start : start + values.size], codes)
        n_wrong += _count_different(nested_absmax[group : group + nested.size], nested)
    return n_wrong


def _absmax_chunks(absmax: Raw, float_format: FloatFormat) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, absmax.size, ABSMAX_CHUNK):
        yield start, widen(absmax[start : start + ABSMAX_CHUNK], float_format)
