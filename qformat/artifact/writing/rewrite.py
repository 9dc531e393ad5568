"""From an artifact to one with the same layout and some other bytes: what is not replaced is copied, digests checked.

Every component keeps its place and size, so that headers, index and config stay as they are, byte for byte. Only the
manifest is made anew. The files are streamed; memory does not depend on the size of the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qformat
from qformat.artifact.components import Component
from qformat.artifact.digests import READ_NBYTES, Xxh3, xxh3
from qformat.artifact.manifest import FileRecord, JsonObject, KeptRecord, Manifest, TensorRecord
from qformat.artifact.reading.reader import Artifact
from qformat.artifact.reading.regular_files import open_regular, read_exactly
from qformat.artifact.writing.staging import Staging
from qformat.errors import ArtifactError, Reason, UsageError
from qformat.names import MANIFEST_NAME

Replacements = Mapping[str, Mapping[Component, NDArray[Any]]]
"""By tensor and component, other bytes. Those of a kept tensor stand under `Component.PACKED`."""


def rewrite_artifact(
    artifact: Artifact,
    staging: Staging,
    replacements: Replacements,
    *,
    recipe: JsonObject,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write an artifact with other bytes in some components into a staged folder, and seal it.

    recipe: of the new manifest, which has no evaluation, since that was of other bytes. Kept tensors that change name
    the digest of the source. on_progress: bytes of shards written.
    Raises ArtifactError for damage in what is copied, UsageError for bytes that do not fit, TargetError.
    """
    _refuse_what_does_not_fit(artifact, replacements)
    manifest = artifact.manifest
    new = {name + part.value: data for name, parts in replacements.items() for part, data in parts.items()}
    copy = _Copy(artifact, staging, new, _digests(manifest), on_progress)
    files = {
        name: copy.small_file(name, record) if record.header_xxh3 is None else copy.shard(name, record)
        for name, record in manifest.files.items()
    }
    written = Manifest(
        tensors={name: _record(record, replacements.get(name)) for name, record in manifest.tensors.items()},
        files=files,
        recipe=recipe,
        source=manifest.source,
        generator=f"qformat {qformat.__version__}",
        format_version=manifest.format_version,
        must_understand=manifest.must_understand,
        extra=manifest.extra,
    )
    staging.disk.write_file(staging.folder / MANIFEST_NAME, written.to_bytes())
    staging.seal()


def _digests(manifest: Manifest) -> dict[str, str]:
    """Return the XXH3-128 of every component and kept tensor, by its name in the shards."""
    found: dict[str, str] = {}
    for name, record in manifest.tensors.items():
        if isinstance(record, KeptRecord):
            found[name] = record.xxh3
        else:
            found |= {name + part.value: digest for part, digest in record.components.items()}
    return found


def _refuse_what_does_not_fit(artifact: Artifact, replacements: Replacements) -> None:
    for name, parts in replacements.items():
        for part, data in parts.items():
            located = artifact.located.get(name + part.value)
            if located is None or located.entry.nbytes != data.nbytes or not data.flags.c_contiguous:
                has = "no such component" if located is None else f"{located.entry.nbytes} bytes there"
                raise UsageError(f"{artifact.path}: {name}: {part.label}: {data.nbytes} new bytes, but it has {has}")


def _record(record: TensorRecord, parts: Mapping[Component, NDArray[Any]] | None) -> TensorRecord:
    """Return the record of a tensor, some of whose bytes may be replaced."""
    if parts is None:
        return record
    if isinstance(record, KeptRecord):
        digest, source = xxh3(parts[Component.PACKED]), record.source_xxh3 or record.xxh3
        return replace(record, xxh3=digest, source_xxh3=None if digest == source else source)
    return replace(record, components={**record.components, **{part: xxh3(data) for part, data in parts.items()}})


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy in the making. new: other bytes, digests: what copied ones must have, by names in the shards."""

    artifact: Artifact
    staging: Staging
    new: Mapping[str, NDArray[Any]]
    digests: Mapping[str, str]
    on_progress: Callable[[int], None]

    def small_file(self, name: str, record: FileRecord) -> FileRecord:
        """Copy a file that is no shard. Raises ArtifactError (file_digest), TargetError."""
        path = self.artifact.path / name
        data = bytearray(record.nbytes)
        with open_regular(self.artifact.path, name, error=ArtifactError) as descriptor:
            read_exactly(descriptor, 0, memoryview(data), path=path, error=ArtifactError)
        found = hashlib.sha256(data).hexdigest()
        if found != record.sha256:
            raise _changed(path, Reason.FILE_DIGEST, f"SHA-256 {found}, expected {record.sha256}")
        self.staging.disk.write_file(self.staging.folder / name, bytes(data))
        return record

    def shard(self, name: str, record: FileRecord) -> FileRecord:
        """Write a shard, and return its new record. Raises ArtifactError (file_digest, component_digest), TargetError.

        What an interrupted run left of it is written again.
        """
        disk, path = self.staging.disk, self.staging.folder / name
        sha256 = hashlib.sha256()
        with open_regular(self.artifact.path, name, error=ArtifactError) as source:
            out = disk.open_for_writing(path)
            try:
                disk.set_size(out, record.nbytes, path)
                offset = 0
                for data in self._contents(name, record, source):
                    disk.write_at(out, data, offset, path)
                    sha256.update(data)
                    offset += len(data)
                    self.on_progress(len(data))
                assert offset == record.nbytes
            finally:
                os.close(out)
        return replace(record, sha256=sha256.hexdigest())

    def _contents(self, shard: str, record: FileRecord, source: int) -> Iterator[memoryview]:
        """Yield the bytes of a new shard from its beginning on, in scratch memory."""
        path = self.artifact.path / shard
        entries = [located.entry for located in self.artifact.located.values() if located.shard == shard]
        entries.sort(key=lambda entry: (entry.start, entry.stop))
        assert record.header_xxh3 is not None
        yield from _checked(source, 0, entries[0].start, path, record.header_xxh3, tensor=None)
        for entry in entries:
            if entry.name in self.new:
                yield self.new[entry.name].reshape(-1).view(np.uint8).data
            else:
                digest = self.digests[entry.name]
                yield from _checked(source, entry.start, entry.stop, path, digest, tensor=entry.name)


def _checked(
    descriptor: int, start: int, stop: int, path: Path, expected: str, *, tensor: str | None
) -> Iterator[memoryview]:
    """Yield bytes [start, stop) of a file. Raises ArtifactError at their end if their XXH3-128 is not the expected."""
    digest = Xxh3()
    buffer = memoryview(bytearray(min(READ_NBYTES, stop - start)))
    for position in range(start, stop, READ_NBYTES):
        part = buffer[: min(READ_NBYTES, stop - position)]
        read_exactly(descriptor, position, part, path=path, error=ArtifactError)
        digest.update(part)
        yield part
    if (found := digest.hexdigest()) != expected:
        reason = Reason.FILE_DIGEST if tensor is None else Reason.COMPONENT_DIGEST
        raise _changed(path, reason, f"bytes {start} to {stop}: XXH3-128 {found}, expected {expected}", tensor)


def _changed(path: Path, reason: Reason, what: str, tensor: str | None = None) -> ArtifactError:
    return ArtifactError(reason, path, f"was changed: {what}", tensor=tensor, next_step="Fetch the file again")
