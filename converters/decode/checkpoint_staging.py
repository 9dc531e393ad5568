"""Staging of a folder that has no manifest: a plain checkpoint (see `qformat.artifact.writing.staging`).

Two things differ from an artifact. After a crash, an artifact is recognised under its final name by its manifest, which
names every byte; a checkpoint by its folder's inode, which a rename keeps, and its index. And what `replace` may
exchange is a checkpoint with an index, never an artifact.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.staging import Staging, _holds_something, _read_journal, work_folder
from qformat.errors import TargetError
from qformat.names import INDEX_NAME, MANIFEST_NAME
from qformat.strict_json import Json


class CheckpointStaging(Staging):
    """A checkpoint folder in the making."""

    @classmethod
    def begin(
        cls, out: Path, fingerprint: str, *, disk: Disk, replace: bool = False, restart: bool = False,
        note: JsonObject | None = None,
    ) -> Staging:  # fmt: skip
        """Start writing `out`, or continue an interrupted run with the same fingerprint, as for an artifact.

        replace: a checkpoint with an index (or an empty folder) may be there and is exchanged at the seal.
        Raises TargetError.
        """
        work = work_folder(out)
        if os.path.isdir(out.parent) and not os.path.lexists(work):
            check_checkpoint_target(out, replace=replace)
            disk.make_folder(work)  # with it there, the check for artifacts is left out
        return super().begin(out, fingerprint, disk=disk, replace=replace, restart=restart, note=note)

    def seal(self) -> None:
        """Bring everything to the disk and give the folder its final name."""
        assert self._journal is not None
        for path in sorted(self.folder.iterdir()):
            descriptor = self.disk.open_for_writing(path)
            try:
                self.disk.sync(descriptor, path)
            finally:
                os.close(descriptor)
        self.disk.sync_folder(self.folder)
        check_checkpoint_target(self.out, replace=self._replace)  # what stands there now?
        self.record({"sealing": _identity(self.folder)})
        self.disk.sync(self._journal, self._journal_path)
        if os.path.isdir(self.out) and _holds_something(self.out):
            self.disk.exchange(self.folder, self.out, aside=self.work / "replaced")
        else:
            self.disk.rename(self.folder, self.out)
        self.disk.sync_folder(self.out.parent)
        self._clean_up()

    def _continue_or_start(self, fingerprint: str, *, restart: bool) -> None:
        entries, valid_nbytes = ([], 0) if restart else _read_journal(self._journal_path)
        if entries and entries[0].get("fingerprint") != fingerprint:
            check_checkpoint_target(self.out, replace=self._replace)
            raise TargetError(
                f"{self.work}: was begun from another artifact or options than these. "
                "Continue with the same ones, or drop what is there with --restart"
            )
        sealing = [entry["sealing"] for entry in entries if "sealing" in entry]
        if sealing and sealing[-1] is not None and sealing[-1] == _identity(self.out):
            self.sealed_before = True
            self._clean_up()
            return
        try:
            check_checkpoint_target(self.out, replace=self._replace)
        except TargetError:
            if not entries:  # a crash in the very last step of an earlier run left an empty work folder
                self._clean_up()
            raise
        if not entries:
            self.disk.remove_folder(self.folder)
        self.disk.make_folder(self.folder)
        self._journal = self.disk.open_for_writing(self._journal_path, append=True)
        self.disk.set_size(self._journal, valid_nbytes, self._journal_path)
        if entries:
            self.entries = entries[1:]
        else:
            self.record({**self._note, "fingerprint": fingerprint})


def check_checkpoint_target(out: Path, *, replace: bool) -> None:
    """Refuse an output path that holds something: anything, or with `replace` anything but a checkpoint."""
    if not os.path.lexists(out):
        return
    if not os.path.isdir(out) or os.path.islink(out):
        raise TargetError(f"{out}: exists and is no folder. Choose another name")
    if not _holds_something(out):
        return
    if os.path.lexists(out / MANIFEST_NAME):
        raise TargetError(f"{out}: is a 4-bit artifact, which an export does not replace. Choose another name")
    if not os.path.isfile(out / INDEX_NAME):
        raise TargetError(f"{out}: exists, is not empty and is no checkpoint with an index. Choose another name")
    if not replace:
        raise TargetError(f"{out}: exists already. Choose another name, or replace it with --force")


def _identity(folder: Path) -> Json:
    """Return what tells a folder from every other one that stands under its name; None where there is none."""
    try:
        status = os.lstat(folder)
        index = hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_dev, status.st_ino, index]
