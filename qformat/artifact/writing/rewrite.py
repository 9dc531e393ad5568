"""Writing a copy of an artifact or of a bitsandbytes checkpoint with the new bytes of a loaded or tuned model.

Every component keeps its place and size, so the headers and the index stay byte-identical. Components that are not
replaced are copied, and their digests are checked: a damaged component must not get a new, valid digest. If no byte
changes, all files are byte-identical; otherwise the manifest is updated. The output is written atomically (spec
section 2.4). Files are streamed, so memory use does not depend on the size of the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.digests import READ_NBYTES, Buffer, Xxh3, xxh3_of_range
from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import FileRecord, JsonObject, KeptRecord, Manifest, TensorRecord
from qformat.artifact.reading.file_roles import accompanies
from qformat.artifact.reading.listed_files import size_error
from qformat.artifact.reading.manifest_parser import parse
from qformat.artifact.reading.regular_files import open_regular, read_chunks, read_exactly, read_if_regular, read_small
from qformat.artifact.reading.structure import (
    Located,
    ShardLayout,
    Structure,
    check_structure,
    expected_tensors,
)
from qformat.artifact.writing.disk import Disk
from qformat.errors import ArtifactError, Reason, UsageError
from qformat.names import CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from qformat.version import __version__

FETCH_AGAIN = "Fetch the file again"

_FILES_WITHOUT_MANIFEST = (INDEX_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME)
"""Files to copy besides the shards if no manifest lists the files of the model."""


class Staged(Protocol):
    """Directory in which the files of the copy are written before they appear in the output."""

    @property
    def folder(self) -> Path:
        """Directory for the files to write."""

    @property
    def disk(self) -> Disk:
        """File system operations."""

    def seal(self) -> None:
        """Give the files their final names."""


Held = Callable[[str, Located], Buffer | None]
"""Function that returns the new bytes of a component, given its name and its place; None to keep those of the file.
Codes may be without the padding of a wider element."""

Replacements = Mapping[str, Mapping[Component, NDArray[Any]]]
"""New arrays by tensor and component. The array of a kept tensor has the key `Component.PACKED`."""


def rewrite(
    layout: ShardLayout,
    staging: Staged,
    held: Held,
    *,
    files: Mapping[str, bytes] | None = None,
    recipe: JsonObject | None = None,
    next_step: str = FETCH_AGAIN,
) -> bool:
    """Write the shards and all other files to an output directory and seal it.

    If a tensor changes, the new manifest has no evaluation, and the entry of a changed kept tensor gets the digest of
    its source tensor.

    Args:
        layout: Checked shards of the directory to copy.
        staging: Output directory.
        held: Function that returns the new bytes of a component.
        files: New contents of files by name, without shards. All others are copied.
        recipe: New recipe for the manifest, None to keep the old one.
        next_step: Advice in the error about a file that was changed.

    Returns:
        Whether all tensors and files are the same as before.

    Raises:
        ArtifactError: A file is damaged or missing.
        TargetError: The output cannot be written.
    """
    files, disk = dict(files or {}), staging.disk
    copy = _Copy(layout, staging, held, _expected_digests(layout), next_step)
    kept = copy.read_manifest(layout) if isinstance(layout, Structure) else b""
    sha256 = {shard: copy.write_shard(shard) for shard in layout.shard_nbytes}
    removed: list[str] = []
    for name, record in _other_files(layout).items():
        if name in files:
            continue
        if record is not None and accompanies(name, record):
            found = read_if_regular(layout.path, name)
            if found is None:
                removed.append(name)
            elif hashlib.sha256(found).hexdigest() != record.sha256:
                files[name] = found
            else:
                disk.write_file(staging.folder / name, found)
        else:
            disk.write_file(staging.folder / name, copy.read_other(name, record))
    for name, data in files.items():
        disk.write_file(staging.folder / name, data)
    same = not (copy.changed or files or removed)
    if isinstance(layout, Structure):
        if not same or recipe is not None:
            listed = {name: record for name, record in layout.manifest.files.items() if name not in removed}
            old = replace(layout.manifest, files=listed)
            kept = _renewed(old, copy.changed, sha256, files, recipe).to_bytes()
        disk.write_file(staging.folder / MANIFEST_NAME, kept)
        check_structure(staging.folder)
    staging.seal()
    return same


def replaced_by(structure: Structure, replacements: Replacements) -> Held:
    """Return the function `held` of `rewrite` for arrays in memory.

    Args:
        structure: Checked structure of the artifact.
        replacements: New arrays by tensor and component.

    Raises:
        UsageError: An array has the wrong size or is not C-contiguous, or the component does not exist.
    """
    for name, parts in replacements.items():
        for part, data in parts.items():
            located = structure.located.get(name + part.value)
            if located is None or located.entry.nbytes != data.nbytes or not data.flags.c_contiguous:
                expected = "no such component" if located is None else f"{located.entry.nbytes} contiguous bytes"
                raise UsageError(
                    f"{structure.path}: tensor {name!r}: the new {part.label} has {data.nbytes} bytes, "
                    f"but the artifact has {expected}"
                )
    new = {name + part.value: data for name, parts in replacements.items() for part, data in parts.items()}
    return lambda name, _: new.get(name)


@dataclass(frozen=True, slots=True)
class _Copy:
    """State of one copy.

    Attributes:
        layout: Checked shards of the directory to copy.
        staging: Output directory.
        held: Function that returns the new bytes of a component.
        expected: XXH3-128 and tensor, by the name of the component in the shards. Empty without a manifest.
        next_step: Advice in the error about a file that was changed.
        changed: New XXH3-128 of each component that differs from the manifest.
    """

    layout: ShardLayout
    staging: Staged
    held: Held
    expected: Mapping[str, tuple[str, str]]
    next_step: str
    changed: dict[str, str] = field(default_factory=dict)

    def read_manifest(self, layout: Structure) -> bytes:
        """Return the bytes of the manifest. Raises ArtifactError if it changed after it was opened."""
        path = layout.path / MANIFEST_NAME
        data = read_small(layout.path, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
        if parse(data, path) != layout.manifest:
            raise self._damaged(path, "its contents differ from those at the time of opening")
        return data

    def read_other(self, name: str, record: FileRecord | None) -> bytearray:
        """Return the bytes of a file other than a shard.

        Args:
            name: Name of the file.
            record: Entry of the file in the manifest, None without a manifest.

        Raises:
            ArtifactError: The file is missing or damaged.
        """
        path = self.layout.path / name
        with open_regular(self.layout.path, name, error=ArtifactError) as descriptor:
            data = bytearray(os.fstat(descriptor).st_size)
            read_exactly(descriptor, 0, memoryview(data), path=path, error=ArtifactError)
        if record is not None and (found := hashlib.sha256(data).hexdigest()) != record.sha256:
            raise self._damaged(path, f"SHA-256 {found}, expected {record.sha256}")
        return data

    def write_shard(self, name: str) -> str:
        """Write a shard from its beginning and return its SHA-256.

        A shard from an interrupted run is overwritten.

        Raises:
            ArtifactError: The shard to copy is damaged.
            TargetError: The output cannot be written.
        """
        disk, path, nbytes = self.staging.disk, self.staging.folder / name, self.layout.shard_nbytes[name]
        sha256 = hashlib.sha256()
        with open_regular(self.layout.path, name, error=ArtifactError) as source:
            if (found := os.fstat(source).st_size) != nbytes:
                raise size_error(self.layout.path / name, found, nbytes)
            out = disk.open_for_writing(path)
            try:
                disk.set_size(out, nbytes, path)
                offset = 0
                for data in self._contents(name, source):
                    disk.write_at(out, data, offset, path)
                    sha256.update(data)
                    offset += len(data)
                assert offset == nbytes, f"{name}: {offset} bytes, expected {nbytes}"
            finally:
                os.close(out)
        return sha256.hexdigest()

    def _contents(self, shard: str, source: int) -> Iterator[memoryview]:
        """Yield the bytes of a new shard from its beginning, in reused buffers."""
        places = [located for located in self.layout.located.values() if located.shard == shard]
        places.sort(key=lambda located: (located.entry.start, located.entry.stop))
        path = self.layout.path / shard
        header = self.layout.manifest.files[shard].header_xxh3 if isinstance(self.layout, Structure) else None
        data_start = places[0].entry.start if places else self.layout.shard_nbytes[shard]
        yield from self._copied(source, 0, data_start, path, header, tensor=None)
        for located in places:
            name, start, stop = located.entry.name, located.entry.start, located.entry.stop
            data = self.held(name, located)
            if data is None:
                expected, tensor = self.expected.get(name, (None, name))
                yield from self._copied(source, start, stop, path, expected, tensor=tensor)
            else:
                yield from self._replaced(source, located, path, _as_bytes(data))

    def _replaced(self, source: int, located: Located, path: Path, data: memoryview) -> Iterator[memoryview]:
        """Yield the new bytes of a component, padded with bytes of the file, and record their digest if it changed."""
        name, start, stop = located.entry.name, located.entry.start, located.entry.stop
        assert len(data) <= stop - start, f"{name}: {len(data)} bytes, expected {stop - start}"
        fill = memoryview(bytearray(stop - start - len(data)))
        read_exactly(source, stop - len(fill), fill, path=path, error=ArtifactError)
        digest = Xxh3()
        digest.update(data)
        digest.update(fill)
        expected, tensor = self.expected.get(name, (None, name))
        if expected is not None and (found := digest.hexdigest()) != expected:
            # What the new bytes were made from must be whole: a damaged file is not a change.
            before = xxh3_of_range(source, start, stop, path=path, error=ArtifactError)
            if before != expected:
                raise self._damaged(path, _digests(start, stop, before, expected), tensor=tensor)
            self.changed[name] = found
        yield data
        yield fill

    def _copied(
        self, source: int, start: int, stop: int, path: Path, expected: str | None, *, tensor: str | None
    ) -> Iterator[memoryview]:
        """Yield bytes [start, stop) of a file. Raises ArtifactError after them if their XXH3-128 is wrong."""
        digest = Xxh3()
        for _, part in read_chunks(source, start, stop, chunk_nbytes=READ_NBYTES, path=path, error=ArtifactError):
            digest.update(part)
            yield part
        if expected is not None and (found := digest.hexdigest()) != expected:
            raise self._damaged(path, _digests(start, stop, found, expected), tensor=tensor)

    def _damaged(self, path: Path, what: str, *, tensor: str | None = None) -> ArtifactError:
        reason = Reason.FILE_DIGEST if tensor is None else Reason.COMPONENT_DIGEST
        return ArtifactError(reason, path, f"was changed: {what}", tensor=tensor, next_step=self.next_step)


def _digests(start: int, stop: int, found: str, expected: str) -> str:
    return f"bytes {start} to {stop}: XXH3-128 {found}, expected {expected}"


def _as_bytes(data: Buffer) -> memoryview:
    if isinstance(data, np.ndarray):
        return data.reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B")


def _expected_digests(layout: ShardLayout) -> dict[str, tuple[str, str]]:
    if not isinstance(layout, Structure):
        return {}
    found = {}
    for name, (tensor, part, _) in expected_tensors(layout.manifest).items():
        record = layout.manifest.tensors[tensor]
        found[name] = (record.xxh3 if isinstance(record, KeptRecord) else record.components[part], tensor)
    return found


def _other_files(layout: ShardLayout) -> dict[str, FileRecord | None]:
    if isinstance(layout, Structure):
        return {name: record for name, record in layout.manifest.files.items() if not record.is_shard}
    return {name: None for name in _FILES_WITHOUT_MANIFEST if os.path.lexists(layout.path / name)}


def _renewed(
    old: Manifest,
    changed: Mapping[str, str],
    sha256: Mapping[str, str],
    files: Mapping[str, bytes],
    recipe: JsonObject | None,
) -> Manifest:
    """Return the manifest of the copy, given the changed digests of components, shards and other files."""
    tensors: dict[str, TensorRecord] = dict(old.tensors)
    for name, (tensor, part, _) in expected_tensors(old).items():
        if name in changed:
            tensors[tensor] = _with_digest(tensors[tensor], part, changed[name])
    records = {
        name: replace(record, sha256=sha256[name]) if name in sha256 else record for name, record in old.files.items()
    }
    records |= {name: FileRecord.of(data) for name, data in files.items()}
    return replace(
        old,
        tensors=tensors,
        files=records,
        recipe=old.recipe if recipe is None else recipe,
        evaluation=None if changed else old.evaluation,
        generator=f"qformat {__version__}",
    )


def _with_digest(record: TensorRecord, part: Component, digest: str) -> TensorRecord:
    if isinstance(record, KeptRecord):
        source = record.source_xxh3 or record.xxh3
        return replace(record, xxh3=digest, source_xxh3=None if digest == source else source)
    return replace(record, components={**record.components, part: digest})
