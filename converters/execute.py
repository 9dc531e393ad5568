"""The second and third step of a conversion: encode every tensor into staged files, in any order, then seal.

A task is one tensor, streamed in chunks: read, encode, write, hash. Tasks run on a thread pool (the kernels, the
hashes and the system calls release the GIL) and touch disjoint byte ranges, so that order and number of threads
change nothing. What grows with a tensor is only its absmax, kept in the source's own dtype until its mean is known.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Follower, WrittenFile, Xxh3, xxh3, xxh3_of_range
from qformat.artifact.encoded_weight import EncodedWeight, from_components
from qformat.artifact.manifest import MANIFEST_NAME, FileRecord, JsonObject
from qformat.artifact.regular_files import read_exactly
from qformat.artifact.staging import Staging
from qformat.artifact.weight_encoder import WeightEncoder
from qformat.codec import cpu
from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.codec.quant_state import QuantState
from qformat.converters.plan import AdoptedTask, KeptTask, PackedTask, Place, Plan, Task, TensorDigests
from qformat.converters.reading import Reading, reading_of
from qformat.converters.source import Source, SourceTensor
from qformat.converters.staged_shards import Progress, StagedShards, open_shards
from qformat.cores import run_tasks
from qformat.errors import ArtifactError, Interrupted, Reason, SourceError

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


def execute(
    plan: Plan,
    source: Source,
    staging: Staging,
    *,
    workers: int,
    progress: Progress,
    encoder: WeightEncoder | None = None,
) -> None:
    """Write what the plan says into a staged folder and seal it.

    encoder: chooses the codes of some weights; all others get those of the spec's section 4.2.
    Raises SourceError, TargetError; on these and on KeyboardInterrupt the workers stop within a chunk, the staged
    folder stays and a later run continues.
    """
    with ExitStack() as stack:
        output, follower = _open_output(plan, staging, stack)
        reading = reading_of(source)
        stack.callback(reading.close)
        run = _Run(plan, source, reading, staging, output, progress)
        digests = run.resume()
        staging.record({"source_state": run.source_state})
        left = [task for task in plan.tasks if task.source.name not in digests]
        chosen = encoder.names if encoder is not None else frozenset()
        digests |= run.do([task for task in left if task.source.name not in chosen], workers)
        reading.finish()
        if encoder is not None:
            digests |= run.do_chosen([task for task in left if task.source.name in chosen], encoder, digests, workers)
        sha256 = follower.finish()
    files = {shard.name: FileRecord(shard.nbytes, sha256[shard.name], xxh3(shard.header)) for shard in plan.shards}
    files |= _write_small_files(plan, source, staging)
    run.refuse_changed_source()
    manifest = plan.manifest(digests, files)
    staging.disk.write_file(staging.folder / MANIFEST_NAME, manifest.to_bytes())
    staging.seal()


def _open_output(plan: Plan, staging: Staging, stack: ExitStack) -> tuple[StagedShards, Follower]:
    """Open every shard at its final size and write its header; the follower hashes behind the writers."""
    descriptors = open_shards(plan.shards, staging, stack)
    follower = Follower(
        {
            shard.name: WrittenFile(staging.folder / shard.name, descriptors[shard.name], shard.nbytes)
            for shard in plan.shards
        }
    )
    stack.callback(follower.close)
    output = StagedShards(staging.folder, staging.disk, descriptors, follower.mark_written)
    output.write_headers(plan.shards)
    return output, follower


def _write_small_files(plan: Plan, source: Source, staging: Staging) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    carried = {name: source.read_side_file(name) for name in plan.side_files}
    for name, data in {**plan.small_files, **carried}.items():
        staging.disk.write_file(staging.folder / name, data)
        files[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    return files


class _Run:
    """One execution of a plan: the tasks, and what they share."""

    def __init__(
        self, plan: Plan, source: Source, reading: Reading, staging: Staging, output: StagedShards, progress: Progress
    ) -> None:
        self.source_state = dict(sorted(source.state_when_opened.items()))
        self._plan = plan
        self._source = source
        self._reading = reading
        self._staging = staging
        self._output = output
        self._stopping = threading.Event()
        self._progress = progress
        self._buffers = _Buffers()
        self._journal_lock = threading.Lock()

    def resume(self) -> dict[str, TensorDigests]:
        """Return the digests of the tasks that an interrupted run completed and whose bytes are really there."""
        entries = {str(entry["tensor"]): entry for entry in self._reading.trusted(self._staging.entries)}
        states = [entry["source_state"] for entry in self._staging.entries if "source_state" in entry]
        unchanged = bool(states) and states[-1] == self.source_state
        done: dict[str, TensorDigests] = {}
        for task in self._plan.tasks:
            entry = entries.get(task.source.name)
            if entry is None or (digests := _digests_from_journal(task, entry)) is None:
                continue
            if not unchanged and self._digest_source(task) != digests.source_xxh3:
                raise SourceError(
                    Reason.SOURCE_CHANGED,
                    self._source.location / task.source.file,
                    f"was changed since {self._staging.work} was begun",
                    tensor=task.source.name,
                    next_step="Put the old file back, or drop what is half done with --restart",
                )
            if self._is_on_disk(task, digests):
                done[task.source.name] = digests
                self._progress(task.source.nbytes)
        return done

    def do(self, tasks: list[Task], workers: int) -> dict[str, TensorDigests]:
        """Run tasks on a thread pool. Stops all of them on the first error."""
        by_name = {task.source.name: task for task in tasks}
        named = {name: by_name[name] for name in self._reading.begin([task.source for task in tasks], self._record)}
        return run_tasks(
            named,
            self._do,
            workers=workers,
            stopping=self._stopping,
            thread_name="qformat-encode",
            on_stop=self._reading.close,
        )

    def do_chosen(
        self, tasks: list[Task], encoder: WeightEncoder, digests: Mapping[str, TensorDigests], workers: int
    ) -> dict[str, TensorDigests]:
        """Let an encoder choose the codes of tasks. `digests`: of what is staged before."""
        named = {task.source.name: task for task in tasks if isinstance(task, PackedTask)}
        # First of all, since the encoder may take hours: is everything finite?
        sources = run_tasks(
            named, self._examine, workers=workers, stopping=self._stopping, thread_name="qformat-examine"
        )
        packed = {task.source.name: task for task in self._plan.packed}
        staged = _Staged(packed, self._source, self._staging, self._output, set(digests))
        done: dict[str, TensorDigests] = {}
        for name, weight in encoder.encode(staged):
            done[name] = self._store(named[name], weight, sources[name])
            staged.names.add(name)
        assert done.keys() == named.keys(), "an encoder yields all of its weights"
        return done

    def refuse_changed_source(self) -> None:
        """Refuse to seal what was read from files that somebody has changed since they were opened."""
        state = self._source.state()
        for name, before in self.source_state.items():
            if state.get(name) != before:
                raise SourceError(
                    Reason.SOURCE_CHANGED,
                    self._source.location / name,
                    "was changed while it was converted",
                    next_step="Run the same command again: what was read before is checked",
                )

    def _do(self, task: Task) -> TensorDigests:
        if isinstance(task, PackedTask):
            digests = self._encode(task)
        else:
            digests = self._adopt(task) if isinstance(task, AdoptedTask) else self._copy(task)
        self._reading.settle(task.source, digests.source_xxh3)
        self._note(task, digests)
        return digests

    def _note(self, task: Task, digests: TensorDigests) -> None:
        entry: JsonObject = {
            "tensor": task.source.name,
            "source_xxh3": digests.source_xxh3,
            "components": {part.label: digest for part, digest in digests.components.items()},
        }
        self._record(entry)

    def _record(self, entry: JsonObject) -> None:
        with self._journal_lock:
            self._staging.record(entry)

    def _examine(self, task: PackedTask) -> str:
        """Return the XXH3-128 of a weight's source, all of which must be finite."""
        float_format = task.layout.float_format
        digest = Xxh3()
        for offset, chunk in self._chunks(task.source, digest):
            raw: Raw = chunk.view(float_format.raw_dtype)
            if not np.isfinite(widen(raw, float_format)).all():
                raise nonfinite_error(self._source, task.source, offset // float_format.nbytes, raw, float_format)
        return digest.hexdigest()

    def _store(self, task: PackedTask, weight: EncodedWeight, source_xxh3: str) -> TensorDigests:
        """Write all components of a weight that an encoder made."""
        components: dict[Component, str] = {}
        for part, data in weight.components(task.layout).items():
            assert data.nbytes == task.places[part].nbytes
            self._output.write(task.places[part], 0, data)
            components[part] = xxh3(data)
        digests = TensorDigests(components, source_xxh3)
        self._note(task, digests)
        return digests

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
            if not cpu.encode_into(
                raw, layout.float_format, block_size=layout.block_size, packed=packed, absmax=scales
            ):
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
        state = QuantState(
            layout.block_size, layout.float_format, layout.shape, None if offset is None else float(offset)
        )
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
            cpu.encode_absmax_into(values, offset, codes=codes, nested_absmax=nested)
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

    def _digest_source(self, task: Task) -> str:
        digest = Xxh3()
        parts = [task.source] if not isinstance(task, AdoptedTask) else _stored_parts(task)
        for tensor in parts:
            for offset in range(0, tensor.nbytes, CHUNK_NBYTES):
                chunk = self._buffers.source[: min(CHUNK_NBYTES, tensor.nbytes - offset)]
                self._source.read_into(tensor, offset, chunk.data)
                digest.update(chunk)
        return digest.hexdigest()

    def _is_on_disk(self, task: Task, digests: TensorDigests) -> bool:
        """Check staged bytes against the journal; what does not match is made again."""
        for part, place in _places(task).items():
            stop = place.start + place.nbytes
            path = self._staging.folder / place.shard
            descriptor = self._output.descriptors[place.shard]
            found = xxh3_of_range(descriptor, place.start, stop, path=path, error=ArtifactError)
            if found != digests.components[part]:
                return False
        for place in _places(task).values():
            self._output.on_written(place.shard, place.start, place.start + place.nbytes)
        return True


@dataclass(frozen=True, slots=True)
class _Staged:
    """What is staged, for an encoder. tasks: of all packed weights; names: of the tensors that are staged."""

    tasks: Mapping[str, PackedTask]
    source: Source
    staging: Staging
    output: StagedShards
    names: set[str]

    def read_source(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor of the source."""
        tensor = self.source.tensors[name]
        data = np.empty(tensor.nbytes, np.uint8)
        self.source.read_into(tensor, 0, data.data)
        return data

    def is_staged(self, name: str) -> bool:
        """Whether a weight is encoded and staged already."""
        return name in self.names

    def read_encoded(self, name: str) -> EncodedWeight:
        """Return a weight that is staged."""
        parts = {part: self._read(place) for part, place in self.tasks[name].places.items()}
        return from_components(parts, path=self.staging.folder, tensor=name)

    def _read(self, place: Place) -> NDArray[np.uint8]:
        data = np.empty(place.nbytes, np.uint8)
        path = self.staging.folder / place.shard
        read_exactly(self.output.descriptors[place.shard], place.start, data.data, path=path, error=ArtifactError)
        return data


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
        total = cpu.add_in_order(widen(absmax[start : start + ABSMAX_CHUNK], float_format), total)
    return np.float32(total / absmax.size)


def _places(task: Task) -> Mapping[Component, Place]:
    return {Component.PACKED: task.place} if isinstance(task, KeptTask) else task.places


def _stored_parts(task: AdoptedTask) -> list[SourceTensor]:
    """Return the parts of an adopted weight in the order in which they are copied."""
    return [task.weight.parts[part] for part in task.places if part in task.weight.parts]


def _digests_from_journal(task: Task, entry: JsonObject) -> TensorDigests | None:
    """Read a journal entry; None if it does not describe this task, which is then done again."""
    components, source_xxh3 = entry.get("components"), entry.get("source_xxh3")
    labels = {part.label: part for part in _places(task)}
    if not isinstance(components, dict) or components.keys() != labels.keys() or not isinstance(source_xxh3, str):
        return None
    return TensorDigests({labels[label]: str(digest) for label, digest in components.items()}, source_xxh3)
