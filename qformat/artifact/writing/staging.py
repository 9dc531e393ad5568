"""Atomic writing of an output directory: staged files, a journal, a final rename, and resumption after a crash.

Spec section 2.4 describes what readers see. Artifacts and plain checkpoints use the same procedure; `output_kind`
defines the differences.

While `OUT` is being written, `OUT.partial/` contains

    lock       locked by the process that writes
    journal    JSON lines, each preceded by its XXH3-128: the fingerprint of the run, then each complete part with its
               digests
    folder/    the files under their final names

The seal syncs every file, records in the journal that the rename follows, and renames `folder/` to `OUT`, or exchanges
the two if an old `OUT` is replaced. At any time `OUT` is therefore absent, the old directory or the complete new one.

After a crash, the same command reads the journal, compares its digests with the staged bytes, and resumes. The order in
which other writes reach the disk does not matter, because a part with wrong digests is written again.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import RESUMES, Disk, allocated_nbytes
from qformat.artifact.writing.output_kind import ARTIFACT, OutputKind, check_target, holds_something
from qformat.errors import ArtifactError, InvalidFileError, Option, TargetError
from qformat.named_files import read_named
from qformat.names import PARTIAL_SUFFIX

_MAX_LINE_NBYTES = 2**20
_MAX_JOURNAL_NBYTES = 2 * MAX_MANIFEST_NBYTES  # a journal has the records of a manifest, and a digest for each
_LOCK_ATTEMPTS = 100


class Staging:
    """Unfinished output directory. Use it as a context manager; after leaving it without `seal`, it can be resumed."""

    def __init__(self, out: Path, work: Path, disk: Disk, lock: int, *, kind: OutputKind, replace: bool) -> None:
        self.out = out
        self.work = work
        self.disk = disk
        self.folder = work / "folder"
        self.entries: list[JsonObject] = []
        self.sealed_before = False
        self._kind = kind
        self._replace = replace
        self._note: JsonObject = {}
        self._journal_path = work / "journal"
        self._lock: int | None = lock
        self._journal: int | None = None
        self._journal_lock = threading.Lock()

    @classmethod
    def begin(
        cls, out: Path, fingerprint: str, *, disk: Disk, kind: OutputKind = ARTIFACT, replace: bool = False,
        restart: bool = False, note: JsonObject | None = None,
    ) -> Staging:  # fmt: skip
        """Start to write `out`, or resume an interrupted run with the same fingerprint.

        Args:
            out: Path of the output directory.
            fingerprint: Digest of everything that the contents depend on.
            disk: File system operations.
            kind: Kind of the output.
            replace: Accept an existing directory of the same kind and replace it at the seal.
            restart: Discard an interrupted run instead of resuming it.
            note: Values to keep in the journal's first entry, which `begun_with` returns.

        Raises:
            TargetError: `out` exists, its parent does not, another process writes to it, or an interrupted run has
                another fingerprint.
        """
        work = work_folder(out)
        if not os.path.isdir(out.parent):
            raise TargetError(f"{out.parent}: does not exist or is not a directory. Create it first")
        if not os.path.lexists(work):
            check_target(out, replace=replace, kind=kind)
        elif os.path.islink(work) or not os.path.isdir(work) or _is_foreign(work):
            raise TargetError(f"{work}: exists and was not created by qformat. Move it or choose another OUT")
        disk.to_continue = RESUMES
        staging = cls(out, work, disk, _take_lock(work, disk), kind=kind, replace=replace)
        try:
            staging._note = note or {}
            staging._continue_or_start(fingerprint, restart=restart)
        except BaseException:
            staging.close()
            raise
        return staging

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, entry: JsonObject) -> None:
        """Append an entry to the journal. Thread-safe."""
        assert self._journal is not None
        text = strict_json.dumps(entry).encode("utf-8")
        with self._journal_lock:
            self.disk.append(self._journal, xxh3(text).encode("ascii") + b" " + text + b"\n", self._journal_path)

    def seal(self) -> None:
        """Sync everything to the disk and rename the directory to its final name."""
        assert self._journal is not None
        for path in sorted(self.folder.iterdir()):
            self.disk.sync_file(path)
        self.disk.sync_folder(self.folder)
        self._check_target()  # hours may have passed since the first check
        self.record({"sealing": self._kind.identity(self.folder)})
        self.disk.sync(self._journal, self._journal_path)
        if os.path.isdir(self.out) and holds_something(self.out):
            self.disk.exchange(self.folder, self.out, aside=self.work / "replaced")
        else:
            self.disk.rename(self.folder, self.out)
        self.disk.sync_folder(self.out.parent)
        self._clean_up()

    def close(self) -> None:
        """Release the journal and the lock. Staged files stay for a later run."""
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._lock = None

    def _continue_or_start(self, fingerprint: str, *, restart: bool) -> None:
        entries, valid_nbytes = ([], 0) if restart else _read_journal(self._journal_path)
        if entries and entries[0].get("fingerprint") != fingerprint:
            self._check_target()
            raise TargetError(
                f"{self.work}: contains an interrupted run with a different {self._kind.made_from}. "
                "Resume it with the same ones, or discard it with ",
                Option("restart", True),
            )
        sealing = [entry["sealing"] for entry in entries if "sealing" in entry]
        if sealing and sealing[-1] is not None and sealing[-1] == self._kind.identity(self.out):
            self.sealed_before = True
            self._clean_up()
            return
        try:
            self._check_target()
        except TargetError:
            if not entries:  # an earlier run crashed in its last step and left an empty work directory
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

    def _check_target(self) -> None:
        check_target(self.out, replace=self._replace, kind=self._kind)

    def _clean_up(self) -> None:
        """Remove the work directory.

        The journal goes after all folders, because it shows that the seal was complete, and then the lock, because it
        shows that the directory is one of qformat.
        """
        for folder in sorted(path for path in self.work.iterdir() if path.is_dir()):
            self.disk.remove_folder(folder)
        self.disk.remove_file(self._journal_path)
        self.disk.remove_file(self.work / "lock")
        self.disk.remove_empty_folder(self.work)
        self.disk.sync_folder(self.out.parent)


def begun_with(out: Path) -> JsonObject:
    """Return the fingerprint and the note of an interrupted run, or nothing if there is none."""
    work = work_folder(out)
    entries, _ = _read_journal(work / "journal") if os.path.isdir(work) else ([], 0)
    return entries[0] if entries else {}


def refuse_nested(source: Path, out: Path) -> None:
    """Check that an output is not inside its source and does not contain it.

    Args:
        source: Path of the source.
        out: Path of the output directory.

    Raises:
        TargetError: One of the two directories contains the other.
    """
    inside, outside = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if inside == outside or inside.is_relative_to(outside):
        raise TargetError(f"{out}: is inside the source. Choose a directory next to it")
    if outside.is_relative_to(inside):
        raise TargetError(f"{out}: contains the source. Choose a directory next to it")


def refuse_full_disk(out: Path, nbytes: int, disk: Disk) -> None:
    """Check that the disk has enough space for an output. The space of staged files counts as available.

    Args:
        out: Path of the output directory.
        nbytes: Size of the output in bytes.
        disk: File system operations.

    Raises:
        TargetError: There is not enough space.
    """
    needed, free = nbytes - allocated_nbytes(work_folder(out)), disk.free_nbytes(out.parent)
    if needed > free:
        raise TargetError(
            f"{out}: not enough disk space: needs {needed:,} bytes, {free:,} bytes are free. "
            "Free some space or choose another disk"
        )


def work_folder(out: Path) -> Path:
    """Return the path of the work directory, next to `out`.

    Raises:
        TargetError: The path does not end in a name.
    """
    if out.name in {"", ".."}:
        raise TargetError(f"{out}: does not end in a name. Give the path of the directory to create")
    return out.with_name(out.name + PARTIAL_SUFFIX)


def _is_foreign(work: Path) -> bool:
    return holds_something(work) and not os.path.isfile(work / "lock")


def _take_lock(work: Path, disk: Disk) -> int:
    """Make the work directory and lock it for this process. The lock ends with the process.

    Another process may finish, and remove the directory, before any of these steps.
    """
    path = work / "lock"
    for _ in range(_LOCK_ATTEMPTS):
        disk.make_folder(work)
        try:
            descriptor = disk.open_for_writing(path)
        except TargetError as problem:
            if isinstance(problem.__cause__, FileNotFoundError):
                continue
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise TargetError(f"{work}: another process is writing to it. Wait for it or choose another OUT") from None
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
    raise TargetError(f"{work}: other processes keep writing to it. Wait for them or choose another OUT")


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        mine, there = os.fstat(descriptor), path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _read_journal(path: Path) -> tuple[list[JsonObject], int]:
    """Return the entries of a journal before the first damaged or incomplete line, and their size in bytes."""
    try:
        data = read_named(path, max_nbytes=_MAX_JOURNAL_NBYTES)
    except FileNotFoundError:
        return [], 0
    except OSError as problem:
        raise TargetError(f"{path}: cannot be read: {problem.strerror}. Remove {path.parent} and start again") from None
    entries: list[JsonObject] = []
    valid_nbytes = 0
    for line in data.splitlines(keepends=True):
        digest, _, text = line.partition(b" ")
        if not text.endswith(b"\n") or digest != xxh3(text[:-1]).encode("ascii"):
            break
        try:
            entry = strict_json.loads(text, path=path, max_nbytes=_MAX_LINE_NBYTES, error=ArtifactError)
        except InvalidFileError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
        valid_nbytes += len(line)
    return entries, valid_nbytes
