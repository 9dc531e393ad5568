"""The second and third step of an export: decode every tensor into staged shards, in any order, then seal.

A task is one tensor, streamed in chunks: read, decode (or cast, or copy), write, and hash on both sides. What is read
must have the digests of the manifest, or nothing is sealed. What grows with a tensor is only its nested absmax.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Xxh3, xxh3_of_range
from qformat.artifact.header import TensorEntry
from qformat.artifact.manifest import JsonObject, KeptRecord, PackedRecord
from qformat.artifact.packed_arrays import BlockScales
from qformat.artifact.reading.reader import Artifact
from qformat.artifact.reading.regular_files import open_regular, read_exactly
from qformat.artifact.writing.staging import Staging
from qformat.codec import quant_state
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.codec.quant_state import QuantState
from qformat.converters.decode.plan import ExportPlan, ExportTask, read_small_file
from qformat.converters.decode.write_behind import WriteBehind
from qformat.converters.encode.staged_shards import Progress, StagedShards, open_shards
from qformat.cores import run_tasks
from qformat.errors import ArtifactError, Interrupted, Reason

CHUNK_NBYTES = 4 * 2**20
"""Bytes decoded or copied at a time, into a buffer that is used again: it stays in the caches. A multiple of every
block's size."""

CAST_CHUNK = 2**18
"""Elements of a kept tensor cast at a time: numpy makes several arrays of them."""

_SMALLEST_BLOCK = 32

_LARGEST_FINITE = {FloatFormat.BF16: 3.3895e38, FloatFormat.F16: 65504.0, FloatFormat.F32: 3.4028e38}
"""Largest finite values, rounded down: what stays below them cannot become infinite."""

_INFINITY_BITS = {FloatFormat.BF16: 0x7F80, FloatFormat.F16: 0x7C00}


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """What executing a task found: the XXH3-128 of the bytes written, and finite values that became infinite."""

    xxh3: str
    n_overflowed: int


def execute_export(
    plan: ExportPlan, artifact: Artifact, staging: Staging, *, workers: int, progress: Progress
) -> dict[str, int]:
    """Write what the plan says into a staged folder and seal it.

    Returns how many finite values of a tensor became infinite, for each tensor that has some. progress: bytes written.
    Raises ArtifactError (component_digest, file_digest, truncated), TargetError; on these and on KeyboardInterrupt the
    workers stop within a chunk, the staged folder stays and a later run continues.
    """
    with ExitStack() as stack:
        shards = _Shards(artifact, stack)
        descriptors = open_shards(plan.shards, staging, stack)
        write_behind = WriteBehind(staging.disk, staging.folder, descriptors)
        stack.callback(write_behind.close)
        output = StagedShards(staging.folder, staging.disk, descriptors, write_behind.mark_written)
        output.write_headers(plan.shards)
        run = _Run(plan, shards, staging, output, progress)
        written = run.resume()
        written |= run.do([task for task in plan.tasks if task.name not in written], workers)
        write_behind.finish()
    for name, data in plan.small_files.items():
        staging.disk.write_file(staging.folder / name, data)
    for name in plan.side_files:
        staging.disk.write_file(staging.folder / name, read_small_file(artifact, name))
    staging.seal()
    return {task.name: count for task in plan.tasks if (count := written[task.name].n_overflowed)}


class _Part:
    """A component or kept tensor of the artifact, read in order into given buffers, and hashed as it passes.

    Buffers that are used again are faster than a mapping: a fresh page costs more than copying or decoding it.
    """

    def __init__(self, label: str, tensor: str, path: Path, descriptor: int, entry: TensorEntry, expected: str) -> None:
        self._label = label
        self._tensor = tensor
        self._path = path
        self._descriptor = descriptor
        self._entry = entry
        self._expected = expected
        self._digest = Xxh3()
        self._position = entry.start

    def read_into(self, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the next bytes. Raises ArtifactError."""
        read_exactly(self._descriptor, self._position, out.data, path=self._path, error=ArtifactError)
        self._digest.update(out)
        self._position += out.size

    def read_all(self) -> NDArray[np.uint8]:
        """Return all bytes, checked. Raises ArtifactError."""
        out = np.empty(self._entry.nbytes, np.uint8)
        self.read_into(out)
        self.check()
        return out

    def check(self) -> None:
        """Compare the digest once everything is read. Raises ArtifactError (component_digest)."""
        assert self._position == self._entry.stop
        if (found := self._digest.hexdigest()) != self._expected:
            where = f"{self._label} (bytes {self._entry.start} to {self._entry.stop})"
            raise ArtifactError(
                Reason.COMPONENT_DIGEST,
                self._path,
                f"{where} was changed: XXH3-128 {found}, expected {self._expected}",
                tensor=self._tensor,
                next_step="Fetch the file again",
            )


class _Shards:
    """The artifact's shards, open for reading."""

    def __init__(self, artifact: Artifact, stack: ExitStack) -> None:
        self._artifact = artifact
        self._descriptors = {
            name: stack.enter_context(open_regular(artifact.path, name, error=ArtifactError))
            for name, record in artifact.manifest.files.items()
            if record.header_xxh3 is not None
        }

    def kept(self, name: str, record: KeptRecord) -> _Part:
        """Return the data of a kept tensor."""
        return self._part("data", name, Component.PACKED, record.xxh3)

    def packed(self, name: str, record: PackedRecord) -> dict[Component, _Part]:
        """Return the components of a packed tensor."""
        return {part: self._part(part.label, name, part, digest) for part, digest in record.components.items()}

    def path_of(self, name: str) -> Path:
        """Return the file of a tensor's first component, for messages."""
        return self._artifact.path / self._artifact.located[name].shard

    def _part(self, label: str, name: str, part: Component, expected: str) -> _Part:
        located = self._artifact.located[name + part.value]
        path = self._artifact.path / located.shard
        return _Part(label, name, path, self._descriptors[located.shard], located.entry, expected)


class _Buffers(threading.local):
    """Scratch memory of one worker thread, made once."""

    def __init__(self) -> None:
        self.out = np.empty(CHUNK_NBYTES, np.uint8)
        self.packed = np.empty(CHUNK_NBYTES // 4, np.uint8)
        self.scales = np.empty(CHUNK_NBYTES // 2 // _SMALLEST_BLOCK * 4, np.uint8)


class _Run:
    """One execution of a plan: the tasks, and what they share."""

    def __init__(
        self, plan: ExportPlan, shards: _Shards, staging: Staging, output: StagedShards, progress: Progress
    ) -> None:
        self._plan = plan
        self._shards = shards
        self._staging = staging
        self._output = output
        self._progress = progress
        self._stopping = threading.Event()
        self._buffers = _Buffers()
        self._journal_lock = threading.Lock()

    def resume(self) -> dict[str, WrittenTensor]:
        """Return the tensors that an interrupted run completed and whose bytes are really there."""
        entries = {str(entry["tensor"]): entry for entry in self._staging.entries if "tensor" in entry}
        done: dict[str, WrittenTensor] = {}
        for task in self._plan.tasks:
            written = _from_journal(entries.get(task.name))
            if written is not None and self._digest_on_disk(task) == written.xxh3:
                done[task.name] = written
                self._progress(task.place.nbytes)
        return done

    def do(self, tasks: list[ExportTask], workers: int) -> dict[str, WrittenTensor]:
        """Run tasks on threads. Stops all of them on the first error."""
        named = {task.name: task for task in tasks}
        return run_tasks(named, self._do, workers=workers, stopping=self._stopping, thread_name="qformat-export")

    def _do(self, task: ExportTask) -> WrittenTensor:
        digest = Xxh3()
        n_overflowed = 0
        offset = 0
        for chunk, count in self._chunks(task):
            if self._stopping.is_set():
                raise Interrupted
            digest.update(chunk)
            self._output.write(task.place, offset, chunk)
            n_overflowed += count
            offset += chunk.nbytes
            self._progress(chunk.nbytes)
        written = WrittenTensor(digest.hexdigest(), n_overflowed)
        entry: JsonObject = {"tensor": task.name, "xxh3": written.xxh3, "n_overflowed": n_overflowed}
        with self._journal_lock:
            self._staging.record(entry)
        return written

    def _chunks(self, task: ExportTask) -> Iterator[tuple[NDArray[np.generic], int]]:
        """Yield the tensor's new bytes in order, in scratch memory, and how many of their values overflowed.

        Raises ArtifactError, at the end of the tensor for what a digest tells.
        """
        if isinstance(task.record, PackedRecord):
            yield from self._decoded(task, task.record)
        elif task.action == "copy":
            yield from self._copied(task, task.record)
        else:
            yield from self._cast(task, task.record)

    def _copied(self, task: ExportTask, record: KeptRecord) -> Iterator[tuple[NDArray[np.generic], int]]:
        part = self._shards.kept(task.name, record)
        for offset in range(0, task.place.nbytes, CHUNK_NBYTES):
            chunk = self._buffers.out[: min(CHUNK_NBYTES, task.place.nbytes - offset)]
            part.read_into(chunk)
            yield chunk, 0
        part.check()

    def _cast(self, task: ExportTask, record: KeptRecord) -> Iterator[tuple[NDArray[np.generic], int]]:
        part = self._shards.kept(task.name, record)
        target, source = self._plan.target, FloatFormat(record.dtype)
        n_elements = task.place.nbytes // target.nbytes
        for start in range(0, n_elements, CAST_CHUNK):
            count = min(CAST_CHUNK, n_elements - start)
            data = self._buffers.out[: count * source.nbytes]
            part.read_into(data)
            values = widen(data.view(source.raw_dtype), source)
            chunk = narrow(values, target)
            yield chunk, _count_infinite(chunk, target) - int(np.isinf(values).sum())
        part.check()

    def _decoded(self, task: ExportTask, record: PackedRecord) -> Iterator[tuple[NDArray[np.generic], int]]:
        target, layout = self._plan.target, record.layout
        parts = self._shards.packed(task.name, record)
        state, scales = self._read_small(task.name, parts)
        scale_nbytes = 1 if layout.double_quant else 4
        step = CHUNK_NBYTES // target.nbytes
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
            # No code's value is larger than 1: what is decoded is at most the scale.
            yield chunk, 0 if run.largest_scale() <= _LARGEST_FINITE[target] else _count_infinite(chunk, target)
        parts[Component.PACKED].check()
        parts[Component.ABSMAX].check()

    def _read_small(
        self, name: str, parts: Mapping[Component, _Part]
    ) -> tuple[QuantState, dict[Component, NDArray[np.uint8]]]:
        """Read and check the small components of a packed tensor: all but its codes and absmax."""
        streamed = {Component.PACKED, Component.ABSMAX}
        small = {part: source.read_all() for part, source in parts.items() if part not in streamed}
        state = quant_state.parse(small[Component.QUANT_STATE].tobytes(), path=self._shards.path_of(name), tensor=name)
        return state, small

    def _digest_on_disk(self, task: ExportTask) -> str:
        start, stop = task.place.start, task.place.start + task.place.nbytes
        path = self._staging.folder / task.place.shard
        descriptor = self._output.descriptors[task.place.shard]
        return xxh3_of_range(descriptor, start, stop, path=path, error=ArtifactError)


def _count_infinite(raw: Raw, float_format: FloatFormat) -> int:
    if float_format is FloatFormat.F32:
        return int(np.isinf(raw).sum())
    magnitudes = raw.view(np.uint16) & np.uint16(0x7FFF)
    return int((magnitudes == _INFINITY_BITS[float_format]).sum())


def _from_journal(entry: JsonObject | None) -> WrittenTensor | None:
    """Read a journal entry; None if it does not describe a written tensor, which is then written again."""
    if entry is None:
        return None
    xxh3, n_overflowed = entry.get("xxh3"), entry.get("n_overflowed")
    if not isinstance(xxh3, str) or type(n_overflowed) is not int:
        return None
    return WrittenTensor(xxh3, n_overflowed)
