"""The second and third step of an export: decode every tensor into staged shards, in any order, then seal.

A task is one tensor, streamed in chunks: read, decode (or cast, or copy), write, and hash on both sides. What is read
must have the digests of the manifest, or nothing is sealed. What grows with a tensor is only its nested absmax.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import Xxh3, xxh3_of_range
from qformat.artifact.manifest import JsonObject, KeptRecord, PackedRecord
from qformat.artifact.reader import Artifact
from qformat.artifact.regular_files import open_regular, read_exactly
from qformat.artifact.staging import Staging
from qformat.codec import cpu, quant_state
from qformat.codec.floats import FloatFormat, Raw, narrow, widen
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.codec.quant_state import QuantState
from qformat.converters.export_plan import ExportPlan, ExportTask, read_small_file
from qformat.converters.staged_shards import Progress, StagedShards, open_shards, run_tasks
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
        read = _Shards(artifact, stack)
        descriptors = open_shards(plan.shards, staging, stack)
        output = StagedShards(staging.folder, staging.disk, descriptors)
        output.write_headers(plan.shards)
        run = _Run(plan, read, staging, output, progress)
        written = run.resume()
        written |= run.do([task for task in plan.tasks if task.name not in written], workers)
    for name, data in plan.small_files.items():
        staging.disk.write_file(staging.folder / name, data)
    for name in plan.side_files:
        staging.disk.write_file(staging.folder / name, read_small_file(artifact, name))
    staging.seal()
    return {task.name: count for task in plan.tasks if (count := written[task.name].n_overflowed)}


class _Shards:
    """The artifact's shards, open for reading into buffers: fresh pages of a mapping would cost more than the copy."""

    def __init__(self, artifact: Artifact, stack: ExitStack) -> None:
        self._artifact = artifact
        self._descriptors = {
            name: stack.enter_context(open_regular(artifact.path, name, error=ArtifactError))
            for name, record in artifact.manifest.files.items()
            if record.header_xxh3 is not None
        }

    def part(self, tensor: str, part: Component, expected: str) -> _Part:
        located = self._artifact.located[tensor + part.value]
        entry = located.entry
        descriptor = self._descriptors[located.shard]
        file = self._artifact.path / located.shard
        label = part.label if isinstance(self._artifact.manifest.tensors[tensor], PackedRecord) else "data"

        def read(out: NDArray[np.uint8], offset: int) -> None:
            read_exactly(descriptor, entry.start + offset, out.data, path=file, error=ArtifactError)

        def changed(found: str) -> ArtifactError:
            return ArtifactError(
                Reason.COMPONENT_DIGEST,
                file,
                f"{label} (bytes {entry.start} to {entry.stop}) was changed: XXH3-128 {found}, expected {expected}",
                tensor=tensor,
                next_step="Fetch the file again",
            )

        return _Part(entry.nbytes, read, changed, expected)
