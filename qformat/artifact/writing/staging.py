"""One way to write a folder: staged files, a journal, a seal, and resumption (spec section 2.4 tells what readers see).

While `OUT` is being made, `OUT.partial/` holds

    lock       held by the one process that writes
    journal    JSON lines, each behind its XXH3-128: what was begun, and each part that is complete, with its digests
    folder/    the files under their final names

The seal brings every file to the disk, notes in the journal that it is about to happen, and renames `folder/` to
`OUT` in one step (or exchanges the two, when an old `OUT` is replaced). So `OUT` is always absent, the old one, or
the whole new one. After a crash the same command finds the journal, checks what it says against the bytes that are
there, and goes on; nothing else needs to reach the disk in any order, since a part whose bytes do not have the
journal's digests is simply made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from qformat import strict_json
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk, allocated_nbytes, free_nbytes
from qformat.errors import ArtifactError, InvalidFileError, TargetError
from qformat.names import MANIFEST_NAME, PARTIAL_SUFFIX

_MAX_LINE_NBYTES = 2**20
_LOCK_ATTEMPTS = 100


class Staging:
    """An output folder in the making. Use as a context manager: leaving it without `seal` keeps it resumable."""

    def __init__(self, out: Path, work: Path, disk: Disk, lock: int, *, replace: bool) -> None:
        self.out = out
        self.work = work
        self.disk = disk
        self.folder = work / "folder"
        self.entries: list[JsonObject] = []
        self.sealed_before = False
        self._replace = replace
        self._note: JsonObject = {}
        self._journal_path = work / "journal"
        self._lock: int | None = lock
        self._journal: int | None = None

    @classmethod
    def begin(
        cls, out: Path, fingerprint: str, *, disk: Disk, replace: bool = False, restart: bool = False,
        note: JsonObject | None = None,
    ) -> Staging:  # fmt: skip
        """Start writing `out`, or continue an interrupted run with the same fingerprint.

        replace: an artifact (or empty folder) of that name may be there and is exchanged at the seal.
        restart: drop what an interrupted run left instead of continuing it.
        note: kept in the journal's first entry, where `begun_with` finds it.
        Raises TargetError: `out` exists, its parent does not, another process writes it, or what an interrupted run
        left was begun from something else.
        """
        work = work_folder(out)
        if not os.path.isdir(out.parent):
            raise TargetError(f"{out.parent}: there is no such folder. Create it first")
        if not os.path.lexists(work):
            check_target(out, replace=replace)
        elif work.is_symlink() or not work.is_dir() or (not (work / "lock").is_file() and _holds_something(work)):
            raise TargetError(f"{work}: is in the way, and qformat did not make it. Move it or choose another OUT")
        disk.make_folder(work)
        staging = cls(out, work, disk, _take_lock(work, disk), replace=replace)
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
        """Append an entry to the journal."""
        assert self._journal is not None
        text = strict_json.dumps(entry).encode("utf-8")
        self.disk.append(self._journal, xxh3(text).encode("ascii") + b" " + text + b"\n", self._journal_path)

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
        check_target(self.out, replace=self._replace)  # hours may have passed: what stands there now?
        self.record({"sealing": _manifest_digest(self.folder)})
        self.disk.sync(self._journal, self._journal_path)
        if os.path.isdir(self.out) and _holds_something(self.out):
            self.disk.exchange(self.folder, self.out, aside=self.work / "replaced")
        else:
            self.disk.rename(self.folder, self.out)
        self.disk.sync_folder(self.out.parent)
        self._clean_up()

    def close(self) -> None:
        """Let go of the journal and the lock; what is staged stays for a later run."""
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._lock = None

    def _continue_or_start(self, fingerprint: str, *, restart: bool) -> None:
        entries, valid_nbytes = ([], 0) if restart else _read_journal(self._journal_path)
        if entries and entries[0].get("fingerprint") != fingerprint:
            check_target(self.out, replace=self._replace)
            raise TargetError(
                f"{self.work}: was begun from another source, recipe or options than these. "
                "Continue with the same ones, or drop what is there with --restart"
            )
        sealing = [entry["sealing"] for entry in entries if "sealing" in entry]
        if sealing and sealing[-1] == _manifest_digest(self.out):
            self.sealed_before = True
            self._clean_up()
            return
        try:
            check_target(self.out, replace=self._replace)
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

    def _clean_up(self) -> None:
        """Remove the work folder, the journal last: until then a crash is recognised as one after the seal."""
        self.disk.remove_folder(self.folder)
        self.disk.remove_folder(self.work / "replaced")
        self.disk.remove_file(self._journal_path)
        self.disk.remove_file(self.work / "lock")
        self.disk.remove_folder(self.work)
        self.disk.sync_folder(self.out.parent)


def begun_with(out: Path) -> JsonObject:
    """Return the journal's first entry if an interrupted run left one: its fingerprint and its note."""
    work = work_folder(out)
    entries, _ = _read_journal(work / "journal") if os.path.isdir(work) else ([], 0)
    return entries[0] if entries else {}


def check_target(out: Path, *, replace: bool) -> None:
    """Refuse an output path that holds something: anything, or with `replace` anything but an artifact."""
    if not os.path.lexists(out):
        return
    if os.path.isdir(out) and not os.path.islink(out):
        if not _holds_something(out):
            return
        if os.path.isfile(out / MANIFEST_NAME):
            if replace:
                return
            raise TargetError(f"{out}: exists already. Choose another name, or replace it with --force")
        raise TargetError(f"{out}: exists, is not empty and is no artifact. Choose another name")
    raise TargetError(f"{out}: exists and is no folder. Choose another name")


def refuse_nested(source: Path, out: Path) -> None:
    """Refuse an output that lies inside what it is made from, or holds it. Raises TargetError."""
    inside, outside = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if inside == outside or inside.is_relative_to(outside):
        raise TargetError(f"{out}: lies inside the source. Choose a folder beside it")
    if outside.is_relative_to(inside):
        raise TargetError(f"{out}: holds the source. Choose a folder beside it")


def refuse_full_disk(out: Path, nbytes: int) -> None:
    """Refuse an output for which the disk has no room; what is staged already counts as there. Raises TargetError."""
    needed, free = nbytes - allocated_nbytes(work_folder(out)), free_nbytes(out.parent)
    if needed > free:
        raise TargetError(
            f"{out}: no space: {needed:,} bytes are needed, {free:,} are free. Make room or choose another disk"
        )


def work_folder(out: Path) -> Path:
    """Return the folder beside `out` in which it is made. Raises TargetError for a path that ends in no name."""
    if out.name in {"", ".."}:
        raise TargetError(f"{out}: does not end in a name. Give the name of the folder that is to be made")
    return out.with_name(out.name + PARTIAL_SUFFIX)


def _holds_something(folder: Path) -> bool:
    try:
        return bool(os.listdir(folder))
    except FileNotFoundError:  # another process has just finished there
        return False
    except OSError as problem:
        raise TargetError(f"{folder}: cannot be listed: {problem.strerror}. Choose another name") from None


def _take_lock(work: Path, disk: Disk) -> int:
    """Lock the work folder for this process; the lock is gone when the process is."""
    path = work / "lock"
    for _ in range(_LOCK_ATTEMPTS):
        descriptor = disk.open_for_writing(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise TargetError(f"{work}: another process is writing there. Wait for it or choose another OUT") from None
        # Whoever held it before may have finished and removed the folder between our open and our lock.
        if path.exists() and _same_file(descriptor, path):
            return descriptor
        os.close(descriptor)
        disk.make_folder(work)
    raise TargetError(f"{work}: others write there again and again. Wait for them or choose another OUT")


def _same_file(descriptor: int, path: Path) -> bool:
    mine, there = os.fstat(descriptor), path.stat()
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _read_journal(path: Path) -> tuple[list[JsonObject], int]:
    """Return the entries of a journal up to the first damaged or torn line, and how many bytes they take."""
    try:
        data = path.read_bytes()
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


def _manifest_digest(folder: Path) -> str | None:
    try:
        return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
