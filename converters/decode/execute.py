"""The second and third stage of an export: decode every tensor into staged shards, in any order, then seal.

Each task handles one tensor and streams it in chunks: it reads, decodes (or casts, or copies), writes, and hashes both
input and output. If any input differs from the manifest's digest, the output is not sealed.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass

from qformat.artifact.digests import Xxh3
from qformat.artifact.manifest import JsonObject
from qformat.artifact.reading.reader import Artifact
from qformat.artifact.reading.shard_files import ShardFiles
from qformat.artifact.writing.behind import WriteBehind
from qformat.artifact.writing.staging import Staging
from qformat.converters.decode.plan import ExportPlan, ExportTask, read_small_file
from qformat.converters.decode.tensor_decoder import TensorDecoder
from qformat.converters.encode.staged_shards import Progress, StagedShards, open_shards
from qformat.converters.sources.chunks import CHUNK_SIZES, ChunkSizes
from qformat.cores import run_tasks
from qformat.errors import Interrupted


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """Result of one task.

    Attributes:
        xxh3: XXH3-128 of the written bytes.
        n_overflowed: Number of finite values that became infinite.
    """

    xxh3: str
    n_overflowed: int


def execute_export(
    plan: ExportPlan,
    artifact: Artifact,
    staging: Staging,
    *,
    workers: int,
    progress: Progress,
    sizes: ChunkSizes = CHUNK_SIZES,
) -> dict[str, int]:
    """Write the planned checkpoint into a staged directory and seal it.

    After an error or KeyboardInterrupt, the workers stop within one chunk, the staged directory remains, and a later
    run resumes.

    Args:
        plan: What to write.
        artifact: The open artifact.
        staging: The staged directory.
        workers: Number of threads. Does not affect the output bytes.
        progress: Called with the number of bytes written since the last call.
        sizes: Sizes of the chunks held in memory.

    Returns:
        The number of finite values that became infinite, for each tensor that has any.

    Raises:
        ArtifactError: A digest does not match (component_digest, file_digest) or a file is truncated.
        TargetError: The output cannot be written.
    """
    with ExitStack() as stack:
        decoder = TensorDecoder(ShardFiles(artifact.structure, stack), plan.target, sizes)
        descriptors = open_shards(plan.shards, staging, stack)
        write_behind = WriteBehind(staging.disk, staging.folder, descriptors, batch_nbytes=sizes.sync_nbytes)
        stack.callback(write_behind.close)
        output = StagedShards(staging.folder, staging.disk, descriptors, write_behind.mark_written)
        output.write_headers(plan.shards)
        run = _Run(plan, decoder, staging, output, progress)
        written = run.resume()
        written |= run.do([task for task in plan.tasks if task.name not in written], workers)
        write_behind.finish()
    for name, data in plan.small_files.items():
        staging.disk.write_file(staging.folder / name, data)
    for name in plan.side_files:
        staging.disk.write_file(staging.folder / name, read_small_file(artifact, name))
    staging.seal()
    return {task.name: count for task in plan.tasks if (count := written[task.name].n_overflowed)}


class _Run:
    """One execution of a plan: the shared state of its tasks."""

    def __init__(
        self,
        plan: ExportPlan,
        decoder: TensorDecoder,
        staging: Staging,
        output: StagedShards,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._decoder = decoder
        self._staging = staging
        self._output = output
        self._progress = progress
        self._stopping = threading.Event()

    def resume(self) -> dict[str, WrittenTensor]:
        """Return the tensors that an interrupted run completed and whose bytes are on disk."""
        entries = {str(entry["tensor"]): entry for entry in self._staging.entries if "tensor" in entry}
        done: dict[str, WrittenTensor] = {}
        for task in self._plan.tasks:
            written = _from_journal(entries.get(task.name))
            if written is not None and self._output.digest(task.place) == written.xxh3:
                done[task.name] = written
                self._progress(task.place.nbytes)
        return done

    def do(self, tasks: list[ExportTask], workers: int) -> dict[str, WrittenTensor]:
        """Run tasks on a thread pool. The first error stops all of them.

        Args:
            tasks: The tasks to run.
            workers: Number of threads.
        """
        named = {task.name: task for task in tasks}
        return run_tasks(named, self._do, workers=workers, stopping=self._stopping, thread_name="qformat-export")

    def _do(self, task: ExportTask) -> WrittenTensor:
        digest = Xxh3()
        n_overflowed = 0
        offset = 0
        for chunk, count in self._decoder.chunks(task):
            if self._stopping.is_set():
                raise Interrupted
            digest.update(chunk)
            self._output.write(task.place, offset, chunk)
            n_overflowed += count
            offset += chunk.nbytes
            self._progress(chunk.nbytes)
        written = WrittenTensor(digest.hexdigest(), n_overflowed)
        entry: JsonObject = {"tensor": task.name, "xxh3": written.xxh3, "n_overflowed": n_overflowed}
        self._staging.record(entry)
        return written


def _from_journal(entry: JsonObject | None) -> WrittenTensor | None:
    """Parse a journal entry. Returns None if it does not describe a written tensor, which is then written again."""
    if entry is None:
        return None
    xxh3, n_overflowed = entry.get("xxh3"), entry.get("n_overflowed")
    if not isinstance(xxh3, str) or type(n_overflowed) is not int:
        return None
    return WrittenTensor(xxh3, n_overflowed)
