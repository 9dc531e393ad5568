"""The second and third step of a conversion: encode every tensor into staged files, in any order, then seal.

A task is one tensor. Tasks run on a thread pool (the kernels, the hashes and the system calls release the GIL) and
touch disjoint byte ranges, so that order and number of threads change nothing. Each one that is done is journaled.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Follower, WrittenFile, xxh3, xxh3_of_range
from qformat.artifact.manifest import FileRecord, JsonObject
from qformat.artifact.packed_arrays import BlockScales, PackedArrays
from qformat.artifact.reading.regular_files import read_exactly
from qformat.artifact.writing.staging import Staging
from qformat.artifact.writing.weight_encoder import WeightEncoder
from qformat.codec import quant_state
from qformat.converters.encode.plan import KeptTask, PackedTask, Place, Plan, Task, TensorDigests
from qformat.converters.encode.staged_shards import Progress, StagedShards, open_shards
from qformat.converters.encode.task_writer import TaskWriter
from qformat.converters.sources.reading import Reading, reading_of
from qformat.converters.sources.source import Source
from qformat.cores import run_tasks
from qformat.errors import ArtifactError, Reason, SourceError
from qformat.names import MANIFEST_NAME


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
        self._writer = TaskWriter(source, output, self._stopping, progress)
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
            if not unchanged and self._writer.digest_source(task) != digests.source_xxh3:
                raise SourceError(
                    Reason.SOURCE_CHANGED,
                    self._source.location / task.source.file,
                    f"was changed since {self._staging.work} was begun",
                    tensor=task.source.name,
                    next_step="Put the old file back, or drop what is half done with --restart",
                )
            if self._is_on_disk(task, digests):
                done[task.source.name] = digests
                self._progress(task.source_nbytes)
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
            named, self._writer.examine, workers=workers, stopping=self._stopping, thread_name="qformat-examine"
        )
        packed = {task.source.name: task for task in self._plan.packed}
        staged = _Staged(packed, self._source, self._staging, self._output, set(digests))
        done: dict[str, TensorDigests] = {}
        for name, weight in encoder.encode(staged):
            done[name] = self._writer.store(named[name], weight, sources[name])
            self._note(named[name], done[name])
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
        digests = self._writer.write(task)
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

    def read_encoded(self, name: str) -> PackedArrays:
        """Return a weight that is staged."""
        parts = {part: self._read(place) for part, place in self.tasks[name].places.items()}
        state = quant_state.parse(parts[Component.QUANT_STATE].tobytes(), path=self.staging.folder, tensor=name)
        return BlockScales.from_bytes(state, parts.__getitem__).with_codes(parts[Component.PACKED])

    def _read(self, place: Place) -> NDArray[np.uint8]:
        data = np.empty(place.nbytes, np.uint8)
        path = self.staging.folder / place.shard
        read_exactly(self.output.descriptors[place.shard], place.start, data.data, path=path, error=ArtifactError)
        return data


def _places(task: Task) -> Mapping[Component, Place]:
    return {Component.PACKED: task.place} if isinstance(task, KeptTask) else task.places


def _digests_from_journal(task: Task, entry: JsonObject) -> TensorDigests | None:
    """Read a journal entry; None if it does not describe this task, which is then done again."""
    components, source_xxh3 = entry.get("components"), entry.get("source_xxh3")
    labels = {part.label: part for part in _places(task)}
    if not isinstance(components, dict) or components.keys() != labels.keys() or not isinstance(source_xxh3, str):
        return None
    return TensorDigests({labels[label]: str(digest) for label, digest in components.items()}, source_xxh3)
