"""Writing an artifact into a directory that has other contents, such as the checkpoints of a training.

The directory cannot be renamed as a whole, so the order of the steps decides what a reader sees (spec section 2.4):

    1. every file is written and synced in a hidden directory inside of the target
    2. an old config.json, manifest and signature are removed: from here on, no reader finds a model
    3. the files get their names, each by a rename; shards of an older model are removed
    4. config.json gets its name, then the manifest

A crash therefore leaves the old artifact, no artifact, or the new one. Writing again completes it.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path

from qformat.artifact.digests import sha256_of_file
from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import FileRecord, Manifest
from qformat.artifact.reading.file_roles import accompanies, is_training_record
from qformat.artifact.reading.manifest_parser import parse
from qformat.artifact.reading.regular_files import open_regular, read_small
from qformat.artifact.reading.side_files import is_side_file
from qformat.artifact.reading.structure import read_manifest
from qformat.artifact.writing.accept_changes import FileChange, merged
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.locked_manifest import locked_folder
from qformat.artifact.writing.manifest_edits import with_accepted
from qformat.errors import ArtifactError, QformatError, TargetError
from qformat.names import CONFIG_NAME, GENERATION_CONFIG_NAME, MANIFEST_NAME, PARTIAL_SUFFIX, SIGNATURE_NAME

_STAGE_NAME = f".qformat{PARTIAL_SUFFIX}"
_SHARD = re.compile(r"model(?:-[0-9]{5}-of-[0-9]{5})?\.safetensors")
"""Names under which transformers and qformat save shards. Those of an older model would be loaded with the new ones."""


class FolderStaging:
    """Unfinished artifact inside of a directory with other contents. Use it as a context manager.

    Tokenizer files, chat templates and documents that are already in the directory stay, and the manifest lists them:
    a program may save the tokenizer before the model. All other files of the model are replaced.

    Attributes:
        folder: Hidden directory for the files to write.
        disk: File system operations.
        kept: After `seal`, files of the directory that the manifest lists instead of the model's own.
    """

    def __init__(self, out: Path, disk: Disk) -> None:
        self.folder = out / _STAGE_NAME
        self.disk = disk
        self.kept: tuple[FileChange, ...] = ()
        self._out = out
        self._stack = ExitStack()

    def __enter__(self) -> FolderStaging:
        for name in (MANIFEST_NAME, CONFIG_NAME):
            if (self._out / name).is_symlink():
                raise TargetError(f"{self._out / name}: is a link. Choose another directory")
        self._stack.enter_context(locked_folder(self._out))
        try:
            self.disk.remove_folder(self.folder)
            self.disk.make_folder(self.folder)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and issubclass(kind, QformatError):
                with suppress(TargetError):
                    self.disk.remove_folder(self.folder)
        finally:
            self._stack.close()

    def seal(self) -> None:
        """Sync the staged files and give them their names, the manifest last."""
        staged = {path.name for path in self.folder.iterdir()}
        for name in staged:
            if (self._out / name).is_dir():
                raise TargetError(f"{self._out / name}: is a directory, but a file of this name must be written")
        if MANIFEST_NAME in staged:
            self._keep_files(staged)
        for name in sorted(staged):
            self.disk.sync_file(self.folder / name)
        self.disk.sync_folder(self.folder)
        older = self._older_shards() - staged
        self._remove(CONFIG_NAME, MANIFEST_NAME, SIGNATURE_NAME)
        for name in sorted(staged - {CONFIG_NAME, MANIFEST_NAME}):
            self.disk.rename(self.folder / name, self._out / name)
        self._remove(*sorted(older))
        for name in (CONFIG_NAME, MANIFEST_NAME):
            if name in staged:
                self.disk.rename(self.folder / name, self._out / name)
                self.disk.sync_folder(self._out)
        self.disk.remove_folder(self.folder)

    def _remove(self, *names: str) -> None:
        """Remove files, so that they are gone before anything else changes."""
        present = [name for name in names if os.path.lexists(self._out / name)]
        for name in present:
            self.disk.remove_file(self._out / name)
        if present:
            self.disk.sync_folder(self._out)

    def _keep_files(self, staged: set[str]) -> None:
        """List the files that stay in the staged manifest, and remove the model's own from the staging directory."""
        path = self.folder / MANIFEST_NAME
        data = read_small(self.folder, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
        manifest = parse(data, path)
        there = sorted(entry.name for entry in self._out.iterdir() if _may_stay(entry.name, manifest))
        stay = {name: record for name in there if (record := _record_of(self._out, name)) is not None}
        for name in stay.keys() & staged:
            self.disk.remove_file(self.folder / name)
        staged.difference_update(stay)
        self.kept = tuple(
            FileChange(name, manifest.files.get(name), record, accompanies(name))
            for name, record in stay.items()
            if manifest.files.get(name) != record
        )
        if self.kept:
            sealed = merged(manifest.sealed or (), self.kept)
            same_model = all(change.accompanies for change in self.kept)
            files = {change.name: change.after for change in self.kept}
            self.disk.write_file(path, with_accepted(data, path, files, sealed=sealed, evaluated=same_model))

    def _older_shards(self) -> set[str]:
        """Return the shards of an older model in the directory."""
        found = {entry.name for entry in self._out.iterdir() if _SHARD.fullmatch(entry.name)}
        try:
            old = read_manifest(self._out)
        except ArtifactError:  # no artifact, or not a readable one
            return found
        return found | {name for name, record in old.files.items() if record.is_shard}


def _may_stay(name: str, manifest: Manifest) -> bool:
    """Return whether a file that is already in the directory stays: it is not one that saving a model writes."""
    record = manifest.files.get(name)
    if accompanies(name, record):
        return not is_training_record(name)
    return is_side_file(name) and name != GENERATION_CONFIG_NAME and not name.endswith(".py")


def _record_of(folder: Path, name: str) -> FileRecord | None:
    """Return the manifest's entry of a file, None if it is not a readable regular file."""
    try:
        with open_regular(folder, name, error=ArtifactError) as descriptor:
            nbytes = os.fstat(descriptor).st_size
            return FileRecord(nbytes, sha256_of_file(descriptor, nbytes, path=folder / name, error=ArtifactError))
    except ArtifactError:
        return None
