"""Read shards from their files to a device: one allocation per shard, filled through a ring of pinned buffers.

    file ── pread ──► buffer ── copy ──► device     several threads read, the calling thread starts the copies
                        └─ XXH3 ──► digest          the calling thread hashes during the copy and the next reads

Copies start in the order of the bytes. A buffer returns to the readers while its copy is pending; the next reader waits
for that copy first.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from qformat.artifact.digests import Xxh3
from qformat.artifact.reading.listed_files import size_error
from qformat.artifact.reading.regular_files import read_exactly
from qformat.artifact.reading.structure import ShardLayout, Structure
from qformat.artifact.reading.verify import Finding, RangeCheck, range_checks
from qformat.artifact.sources.source_files import open_shard
from qformat.cores import usable_cores
from qformat.errors import ArtifactError, Reason, UsageError
from qformat.model.devices.buffer_ring import Buffer, BufferRing
from qformat.model.devices.stream_device import StreamDevice

Verify = Literal["full", "structure", "none"]

CHUNK_NBYTES = 16 * 2**20
"""Bytes of a chunk: large enough that the cost of starting a read or a copy is negligible."""

MAX_READERS = 4
"""Largest number of reading threads. More read no faster from a page cache or an NVMe disk and slow down hashing."""

THREAD_NAME = "qformat-stream"


def data_starts(layout: ShardLayout) -> dict[str, int]:
    """Return the offset in bytes at which the data of each shard begins in its file: index 0 of its device tensor."""
    starts: dict[str, int] = {}
    for located in layout.located.values():
        # The data has no gaps, so it begins where its first entry begins.
        starts[located.shard] = min(located.entry.start, starts.get(located.shard, located.entry.start))
    return starts


def stream_shards(
    layout: ShardLayout,
    device: StreamDevice,
    *,
    verify: Verify,
    chunk_nbytes: int = CHUNK_NBYTES,
    n_buffers: int = 4,
    readers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Read the data section of every shard to a device.

    When the function returns or raises, no thread runs and no copy is pending.

    Args:
        layout: Checked layout of the shards.
        device: Implementation of the device's memory and copies.
        verify: "full" compares the XXH3-128 of every header and component with the manifest, computed from the same
            bytes that are copied. "structure" and "none" compute no digests.
        chunk_nbytes: Bytes per read and per host buffer.
        n_buffers: Number of host buffers.
        readers: Number of threads that read. Default: up to 4.
        progress: Called by this thread with the number of bytes of each chunk after its copy has started and its
            digests have been compared.

    Returns:
        The data of each shard, uint8 [number of bytes], by the shard's name. Index 0 is byte
        `data_starts(layout)[shard]` of the file, a multiple of 4096, so components are aligned as in the file.

    Raises:
        ArtifactError: A file is missing, is not a regular file, has another size or is truncated while it is read. With
            "full", also: a digest differs.
        UsageError: An argument is out of range.
        Exception: Any error that `device` or `progress` raises.
    """
    if verify not in get_args(Verify):
        raise UsageError(f"verify={verify!r}, expected one of {get_args(Verify)}")
    for name, value in (("chunk_nbytes", chunk_nbytes), ("n_buffers", n_buffers), ("readers", readers)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}, expected at least 1")
    starts = data_starts(layout)
    chunks = _chunks(layout, starts, chunk_nbytes)
    with ExitStack() as stack:
        descriptors = _open_shards(layout, starts, stack)
        digests = _Digests(_with_digests(layout), descriptors) if verify == "full" else None
        shards = {shard: device.allocate(layout.shard_nbytes[shard] - start) for shard, start in starts.items()}
        buffer_nbytes = max(chunk.nbytes for chunk in chunks)
        buffers = [Buffer(device.host_buffer(buffer_nbytes)) for _ in range(min(n_buffers, len(chunks)))]
        n_readers = min(readers or min(MAX_READERS, usable_cores()), len(buffers))
        stream = _Stream(layout.path, chunks, descriptors, BufferRing(buffers, len(chunks)))
        stream.run(n_readers, _Forwarding(device, shards, starts, digests, progress))
    return shards


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes from `start` up to, but not including, `stop` of a shard's file."""

    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def _chunks(layout: ShardLayout, starts: Mapping[str, int], chunk_nbytes: int) -> list[_Chunk]:
    """Return the data of all shards in order. A shard without data has one empty chunk, so that it is verified too."""
    chunks = []
    for shard, start in starts.items():
        stop = layout.shard_nbytes[shard]
        for position in range(start, max(stop, start + 1), chunk_nbytes):
            chunks.append(_Chunk(shard, position, min(position + chunk_nbytes, stop)))
    return chunks


def _open_shards(layout: ShardLayout, names: Iterable[str], stack: ExitStack) -> dict[str, int]:
    """Open every shard and check its size. Return descriptors by name; `stack` closes them."""
    descriptors: dict[str, int] = {}
    for shard in names:
        descriptors[shard] = stack.enter_context(open_shard(layout, shard, error=ArtifactError))
        found = os.fstat(descriptors[shard]).st_size
        expected = layout.shard_nbytes[shard]
        if found != expected:
            raise size_error(layout.path / shard, found, expected)
    return descriptors


def _with_digests(layout: ShardLayout) -> Structure:
    if not isinstance(layout, Structure):
        raise UsageError(f"{layout.path}: verify='full' needs the digests of a manifest. This directory has none")
    return layout


@dataclass(frozen=True, slots=True)
class _Forwarding:
    """Handles a chunk that was read: starts its copy, then hashes it while the copy is in flight."""

    device: StreamDevice
    shards: Mapping[str, Tensor]
    starts: Mapping[str, int]
    digests: _Digests | None
    progress: Callable[[int], None] | None

    def forward(self, chunk: _Chunk, buffer: Buffer) -> None:
        """Start the copy of a chunk, update the digests, report progress. Raise ArtifactError if a digest differs."""
        start = self.starts[chunk.shard]
        target = self.shards[chunk.shard][chunk.start - start : chunk.stop - start]
        buffer.ticket = self.device.copy(buffer.host[: chunk.nbytes], target)
        if self.digests is not None:
            self.digests.update(chunk, buffer.data[: chunk.nbytes])
        if self.progress is not None:
            self.progress(chunk.nbytes)


class _Stream:
    """One run: threads read, and the calling thread forwards."""

    def __init__(self, path: Path, chunks: list[_Chunk], descriptors: Mapping[str, int], ring: BufferRing) -> None:
        self._path = path
        self._chunks = chunks
        self._descriptors = descriptors
        self._ring = ring

    def run(self, n_readers: int, forwarding: _Forwarding) -> None:
        """Stream every chunk. When this returns or raises, no thread runs and no copy is pending."""
        started: list[threading.Thread] = []
        try:
            for _ in range(n_readers):
                thread = threading.Thread(target=self._read, name=THREAD_NAME, daemon=True)
                thread.start()
                started.append(thread)
            for number, chunk in enumerate(self._chunks):
                if (buffer := self._ring.take(number)) is None:
                    break
                forwarding.forward(chunk, buffer)
                self._ring.release(buffer)
        except BaseException as error:  # noqa: BLE001 - raised below, when all threads and copies have ended
            self._ring.stop(error)
        self._ring.stop()
        for thread in started:
            thread.join()
        for buffer in self._ring.buffers:
            try:
                buffer.wait()
            except BaseException as error:  # noqa: BLE001 - raised below, unless it only follows from an earlier one
                self._ring.stop(error)
        self._ring.raise_failure()

    def _read(self) -> None:
        try:
            while (claimed := self._ring.claim()) is not None:
                number, buffer = claimed
                self._fill(self._chunks[number], buffer)
                self._ring.deliver(number, buffer)
        except BaseException as error:  # noqa: BLE001 - the calling thread raises it
            self._ring.stop(error)

    def _fill(self, chunk: _Chunk, buffer: Buffer) -> None:
        buffer.wait()
        out = buffer.data[: chunk.nbytes]
        descriptor = self._descriptors[chunk.shard]
        read_exactly(descriptor, chunk.start, out, path=self._path / chunk.shard, error=ArtifactError)


class _Digests:
    """Computes the digests of `verify_integrity` from bytes that arrive in chunks, in order, shard after shard."""

    def __init__(self, structure: Structure, descriptors: Mapping[str, int]) -> None:
        """Check every header. Raise ArtifactError if one is damaged."""
        self._path = structure.path
        findings: list[Finding] = []
        self._due: dict[str, deque[RangeCheck]] = {shard: deque() for shard in descriptors}
        for check in range_checks(structure.path, structure.manifest, descriptors, findings):
            self._due[check.file.name].append(check)
        if findings:
            raise findings[0].as_error(self._path)
        self._state = Xxh3()

    def update(self, chunk: _Chunk, data: memoryview) -> None:
        """Add the bytes of a chunk. Raise ArtifactError at the end of a component whose digest differs."""
        due = self._due[chunk.shard]
        # <= instead of <: an empty component may lie at the very end.
        while due and due[0].start <= chunk.stop:
            check = due[0]
            start, stop = max(check.start, chunk.start), min(check.stop, chunk.stop)
            self._state.update(data[start - chunk.start : stop - chunk.start])
            if stop < check.stop:
                return
            self._compare(due.popleft())

    def _compare(self, check: RangeCheck) -> None:
        found = self._state.hexdigest()
        self._state = Xxh3()
        if found == check.expected:
            return
        # Read the range again: either the finding is exactly that of `qformat verify`, or the two reads differ.
        if (finding := check.run()) is not None:
            raise finding.as_error(self._path)
        raise ArtifactError(
            Reason.COMPONENT_DIGEST,
            check.file,
            f"two reads of bytes {check.start} to {check.stop} differ: the first had XXH3-128 {found}, the second had "
            f"the expected {check.expected}",
            tensor=check.tensor,
            field=check.component,
            next_step="The file was being written, or this machine's memory or disk is unreliable",
        )
