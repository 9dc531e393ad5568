"""A folder of shards written once more, with the bytes that a running model holds now (spec section 2.4).

Where no byte differs, every file is the same, the manifest included. Where one does, the shards keep their layout and
the manifest is renewed. A byte that was damaged in the file, and not changed in the model, is refused: a new digest
must not make it look right.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from qformat.artifact import manifest as manifests
from qformat.artifact.digests import Buffer, sha256_of_file, xxh3
from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import FileRecord, KeptRecord, Manifest, TensorRecord
from qformat.artifact.reading.regular_files import open_regular, read_exactly, read_small
from qformat.artifact.reading.structure import (
    Located,
    ShardLayout,
    Structure,
    check_structure,
    expected_tensors,
    size_error,
)
from qformat.artifact.reading.verify import RangeCheck
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.staging import Staging
from qformat.errors import ArtifactError, Reason
from qformat.names import CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME, MANIFEST_NAME

_FILES_WITHOUT_MANIFEST = (INDEX_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME)
"""What is carried over beside the shards where no manifest says what belongs to the model."""

Held = Callable[[str, Located], Buffer | None]
"""Returns the bytes that a component has now, by its name in the shards; None: those of the file. Codes may
come without the bytes that fill up a wider element."""


def write_back(
    layout: ShardLayout, out: Path, held: Held, *, files: Mapping[str, bytes], generator: str, disk: Disk | None = None
) -> bool:
    """Write the shards of `layout` as `out`, and the files beside them; return whether every byte stayed the same.

    files: what other files hold now, by name; those that are not named are copied.
    generator: the program that renews the manifest, where it must be.

    Raises: ArtifactError for a file of the folder that is gone, or was changed since it was opened; TargetError if
    `out` is there already or cannot be written.
    """
    disk = disk or Disk(sum(layout.shard_nbytes.values()))
    out = Path(os.path.abspath(out))
    with Staging.begin(out, "the tensors of a model", disk=disk, restart=True) as staging:
        changed: dict[str, str] = {}
        for shard in layout.shard_nbytes:
            changed |= _write_shard(layout, shard, held, staging.folder / shard, disk)
        for name, record in _other_files(layout).items():
            if name not in files:
                disk.write_file(staging.folder / name, _read_unchanged(layout.path / name, record))
        for name, data in files.items():
            disk.write_file(staging.folder / name, data)
        if isinstance(layout, Structure):
            kept = _read_manifest(layout)
            renewed = _renewed(layout, changed, files, staging.folder, generator) if changed or files else None
            disk.write_file(staging.folder / MANIFEST_NAME, kept if renewed is None else renewed.to_bytes())
            check_structure(staging.folder)
        staging.seal()
    return not changed and not files


def _write_shard(layout: ShardLayout, shard: str, held: Held, target: Path, disk: Disk) -> dict[str, str]:
    """Write one shard; return the new XXH3-128 of each component that is not what the manifest says, by its name.

    Raises: ArtifactError, TargetError.
    """
    path, nbytes = layout.path / shard, layout.shard_nbytes[shard]
    places = {name: located for name, located in layout.located.items() if located.shard == shard}
    expected = _expected_digests(layout)
    changed: dict[str, str] = {}
    with ExitStack() as stack:
        source = stack.enter_context(open_regular(layout.path, shard, error=ArtifactError))
        if (found := os.fstat(source).st_size) != nbytes:
            raise size_error(path, found, nbytes)
        descriptor = disk.open_for_writing(target)
        stack.callback(os.close, descriptor)
        disk.set_size(descriptor, nbytes, target)
        data_start = min((located.entry.start for located in places.values()), default=nbytes)
        head = _read(source, 0, data_start, path)
        if isinstance(layout, Structure) and xxh3(head) != layout.manifest.files[shard].header_xxh3:
            raise _changed_since(path)
        disk.write_at(descriptor, memoryview(head), 0, target)
        for name, located in places.items():
            start, stop = located.entry.start, located.entry.stop
            data = held(name, located)
            view = _view(_read(source, start, stop, path) if data is None else data)
            if len(view) < stop - start:
                view = memoryview(bytes(view) + _read(source, start + len(view), stop, path))
            assert len(view) == stop - start, f"{name}: {len(view)} bytes, expected {stop - start}"
            disk.write_at(descriptor, view, start, target)
            if name not in expected:
                continue
            check = RangeCheck(source, path, start, stop, *expected[name])
            if (digest := xxh3(view)) != check.expected:
                if view == _read(source, start, stop, path):
                    finding = check.run()
                    raise _changed_since(path) if finding is None else finding.as_error(layout.path)
                changed[name] = digest
    return changed


def _expected_digests(layout: ShardLayout) -> dict[str, tuple[str, str, str]]:
    """Return XXH3-128, tensor and label of every component by its name; nothing where there is no manifest."""
    if not isinstance(layout, Structure):
        return {}
    found = {}
    for name, (tensor, part, _) in expected_tensors(layout.manifest).items():
        record = layout.manifest.tensors[tensor]
        if isinstance(record, KeptRecord):
            found[name] = (record.xxh3, tensor, "data")
        else:
            found[name] = (record.components[part], tensor, part.label)
    return found


def _other_files(layout: ShardLayout) -> dict[str, FileRecord | None]:
    if isinstance(layout, Structure):
        return {name: record for name, record in layout.manifest.files.items() if record.header_xxh3 is None}
    return {name: None for name in _FILES_WITHOUT_MANIFEST if os.path.lexists(layout.path / name)}


def _read_unchanged(path: Path, record: FileRecord | None) -> bytearray:
    with open_regular(path.parent, path.name, error=ArtifactError) as descriptor:
        data = _read(descriptor, 0, os.fstat(descriptor).st_size, path)
    if record is not None and hashlib.sha256(data).hexdigest() != record.sha256:
        raise _changed_since(path)
    return data


def _read_manifest(layout: Structure) -> bytes:
    path = layout.path / MANIFEST_NAME
    data = read_small(layout.path, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    if manifests.parse(data, path) != layout.manifest:
        raise _changed_since(path)
    return data


def _renewed(
    layout: Structure, changed: Mapping[str, str], files: Mapping[str, bytes], folder: Path, generator: str
) -> Manifest:
    """Return the manifest of what was written into `folder`."""
    old = layout.manifest
    tensors: dict[str, TensorRecord] = dict(old.tensors)
    for name, (tensor, part, _) in expected_tensors(old).items():
        record = tensors[tensor]
        if name not in changed:
            continue
        if isinstance(record, KeptRecord):
            tensors[tensor] = dataclasses.replace(record, xxh3=changed[name])
        else:
            tensors[tensor] = dataclasses.replace(record, components={**record.components, part: changed[name]})
    records = dict(old.files)
    for shard in {layout.located[name].shard for name in changed}:
        records[shard] = dataclasses.replace(records[shard], sha256=_sha256(folder / shard))
    for name, data in files.items():
        records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    return dataclasses.replace(old, tensors=tensors, files=records, generator=generator)


def _sha256(path: Path) -> str:
    with open_regular(path.parent, path.name, error=ArtifactError) as descriptor:
        return sha256_of_file(descriptor, os.fstat(descriptor).st_size, path=path, error=ArtifactError)


def _view(data: Buffer) -> memoryview:
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _read(descriptor: int, start: int, stop: int, path: Path) -> bytearray:
    data = bytearray(stop - start)
    read_exactly(descriptor, start, memoryview(data), path=path, error=ArtifactError)
    return data


def _changed_since(path: Path) -> ArtifactError:
    return ArtifactError(
        Reason.FILE_DIGEST,
        path,
        "was changed since the model was loaded",
        next_step="Load the model again, or write its tensors alone with save_pretrained(..., state_dict=...)",
    )
