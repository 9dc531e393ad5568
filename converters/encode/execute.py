"""The second and third stage of a conversion: encode every tensor into staged files, in any order, then seal.

Each task handles one tensor. Tasks run on a thread pool (kernels, hashes and system calls release the GIL) and write
disjoint byte ranges, so that neither their order nor the number of threads affects the output. Each completed task is
recorded in the journal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import FileRecord, JsonObject
from qformat.artifact.packed_arrays import BlockScales, PackedArrays
from qformat.artifact.writing.behind import Follower, WrittenFile
from qformat.artifact.writing.staging import Staging
from qformat.artifact.writing.weight_encoder import WeightEncoder
from qformat.codec import quant_state
from qformat.converters.encode.plan import Plan
from qformat.converters.encode.staged_shards import Progress, StagedShards, open_shards
from qformat.converters.encode.task_writer import TaskWriter
from qformat.converters.encode.tasks import KeptTask, PackedTask, Place, Task, TensorDigests
from qformat.converters.sources.reading import Reading, reading_of
from qformat.converters.sources.source import Source
from qformat.cores import run_tasks
from qformat.errors import Option, Reason, SourceError
from qformat.names import MANIFEST_NAME


def execute(
    plan: Plan,
    source: Source,
    staging: Staging,
    workers: int,
    progress: Progress,
    *,
    encoder: WeightEncoder | None = None,
    before_seal: Callable[[], None] = lambda: None,
) -> None:
    """Write the planned output into a staged directory and seal it.

    After an error or KeyboardInterrupt, the workers stop within one chunk, the staged directory remains, and a later
    run resumes.

    Args:
        plan: What to write.
        source: Where to read.
        staging: The staged directory.
        workers: Number of threads. Does not affect the output bytes.
        progress: Called with the number of source bytes processed since the last call.
        encoder: Chooses the codes of some weights. All others are encoded as in section 4.2 of the spec.
        before_seal: Called when everything except the manifest is written. An error from it leaves the output unsealed.

    Raises:
        SourceError: The source is damaged, changed during the conversion, or a weight contains NaN or Inf.
        TargetError: The output cannot be written.
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
        sha256 = follower.sha256()
    files = {shard.name: FileRecord(shard.nbytes, sha256[shard.name], xxh3(shard.header)) for shard in plan.shards}
    files |= _write_small_files(plan, source, staging)
    run.refuse_changed_source()
    before_seal()
    manifest = plan.manifest(digests, files)
    staging.disk.write_file(staging.folder / MANIFEST_NAME, manifest.to_bytes())
    staging.seal()


def _open_output(plan: Plan, staging: Staging, stack: ExitStack) -> tuple[StagedShards, Follower]:
    """Open every shard at its final size and write its header. The follower hashes what the writers have written."""
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
        files[name] = FileRecord.of(data)
    return files


class _Run:
    """One execution of a plan: the shared state of its tasks."""

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

    def resume(self) -> dict[str, TensorDigests]:
        """Return the digests of the tasks that an interrupted run completed and whose bytes are on disk."""
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
                    f"was changed since the conversion in {self._staging.work} began",
                    tensor=task.source.name,
                    next_step=("Restore the original file, or start over with ", Option("restart", True)),
                )
            if self._is_on_disk(task, digests):
                done[task.source.name] = digests
                self._progress(task.source_nbytes)
        return done

    def do(self, tasks: list[Task], workers: int) -> dict[str, TensorDigests]:
        """Run tasks on a thread pool. The first error stops all of them.

        Args:
            tasks: The tasks to run.
            workers: Number of threads.
        """
        by_name = {task.source.name: task for task in tasks}
        named = {
            name: by_name[name] for name in self._reading.begin([task.source for task in tasks], self._staging.record)
        }
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
        """Store the weights whose codes an encoder chooses.

        Args:
            tasks: The tasks of these weights.
            encoder: Chooses the codes.
            digests: Digests of the tensors that are already staged.
            workers: Number of threads.
        """
        named = {task.source.name: task for task in tasks if isinstance(task, PackedTask)}
        # Check first that everything is finite, because the encoder may take hours.
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
        """Raise SourceError if a file of the source was changed since it was opened."""
        state = self._source.state()
        for name, before in self.source_state.items():
            if state.get(name) != before:
                raise SourceError(
                    Reason.SOURCE_CHANGED,
                    self._source.location / name,
                    "was changed during the conversion",
                    next_step="Run the same command again: tensors read so far are checked, not encoded again",
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
        self._staging.record(entry)

    def _is_on_disk(self, task: Task, digests: TensorDigests) -> bool:
        """Compare the staged bytes with the journal. Tensors that do not match are encoded again."""
        if any(self._output.digest(place) != digests.components[part] for part, place in _places(task).items()):
            return False
        for place in _places(task).values():
            self._output.on_written(place.shard, place.start, place.start + place.nbytes)
        return True


@dataclass(frozen=True, slots=True)
class _Staged:
    """What is staged so far, for an encoder.

    Attributes:
        tasks: Tasks of all packed weights, keyed by name.
        source: The source.
        staging: The staged directory.
        output: The open shards.
        names: Names of the tensors that are staged.
    """

    tasks: Mapping[str, PackedTask]
    source: Source
    staging: Staging
    output: StagedShards
    names: set[str]

    def read_source(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a source tensor."""
        tensor = self.source.tensors[name]
        data = np.empty(tensor.nbytes, np.uint8)
        self.source.read_into(tensor, 0, data.data)
        return data

    def is_staged(self, name: str) -> bool:
        """Return whether a weight is already encoded and staged."""
        return name in self.names

    def read_encoded(self, name: str) -> PackedArrays:
        """Return a staged weight."""
        parts = {part: self.output.read(place) for part, place in self.tasks[name].places.items()}
        state = quant_state.parse(parts[Component.QUANT_STATE].tobytes(), path=self.staging.folder, tensor=name)
        return BlockScales.from_bytes(state, parts.__getitem__).with_codes(parts[Component.PACKED])


def _places(task: Task) -> Mapping[Component, Place]:
    return {Component.PACKED: task.place} if isinstance(task, KeptTask) else task.places


def _digests_from_journal(task: Task, entry: JsonObject) -> TensorDigests | None:
    """Parse a journal entry. Returns None if it does not describe this task, which is then run again."""
    components, source_xxh3 = entry.get("components"), entry.get("source_xxh3")
    labels = {part.label: part for part in _places(task)}
    if not isinstance(components, dict) or components.keys() != labels.keys() or not isinstance(source_xxh3, str):
        return None
    return TensorDigests({labels[label]: str(digest) for label, digest in components.items()}, source_xxh3)
