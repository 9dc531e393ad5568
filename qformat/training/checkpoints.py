"""Checkpoints of a training: written beside their place and renamed, every file under a digest, old ones removed.

OUTPUT/checkpoint-20/            adapter, optimizer, schedule, random states, position; `checkpoint.json`: digests
OUTPUT/partial/checkpoint-30/    one in the making, or what a crash left of it: never read, removed by the next
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from qformat import strict_json
from qformat.artifact.digests import xxh3, xxh3_of_range
from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.errors import AdapterError, ArtifactError, Option, TargetError, UsageError, Words

SEAL_NAME = "checkpoint.json"
PARTIAL_NAME = "partial"
LOCK_NAME = "lock"
LATEST = "latest"

_NAME = re.compile(r"checkpoint-([0-9]{1,12})")
_MAX_SEAL_NBYTES = 2**20
_RESUME: Words = ("continue with ", Option("resume", LATEST))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every byte was compared with its digest. facts: what was noted about the training."""

    folder: Path
    step: int
    facts: JsonObject


class CheckpointFolder:
    """The checkpoints in one output folder. to_continue: what a user is told to do when the disk has room again."""

    def __init__(
        self,
        output: Path,
        *,
        keep: int,
        disk: Disk | None = None,
        to_continue: Words = _RESUME,
    ) -> None:
        self.output = output
        self._keep = keep
        self._to_continue = to_continue
        self._disk = disk or Disk()

    @property
    def partial(self) -> Path:
        """Where checkpoints are made."""
        return self.output / PARTIAL_NAME

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are there, ascending."""
        if not self.output.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.output.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def folder(self, step: int) -> Path:
        """Return where the checkpoint of a step lies."""
        return self.output / f"checkpoint-{step}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other trainings out of the folder, as long as this process lives. Raises TargetError."""
        descriptor = self._disk.open_for_writing(self.output / LOCK_NAME)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TargetError(
                    f"{self.output}: another process trains there. Wait for it or choose another name"
                ) from None
            yield
            self._disk.remove_file(self.output / LOCK_NAME)
        finally:
            os.close(descriptor)

    @contextmanager
    def writing(self, step: int, facts: JsonObject) -> Iterator[Path]:
        """Give out a folder to fill; when the block ends well, seal it, give it its name, and remove the oldest.

        Raises TargetError where the disk is full or cannot be written; then the checkpoints that are there stay whole.
        """
        folder = self.partial / f"checkpoint-{step}"
        self._disk.remove_folder(self.partial)
        self._disk.make_folder(self.partial)
        self._disk.make_folder(folder)
        try:
            yield folder
            self._seal(folder, step, facts)
            self._disk.replace_folder(folder, self.folder(step))
        except BaseException as error:
            with suppress(TargetError):
                self._disk.remove_folder(self.partial)
            problem = disk_problem(error)
            if problem is None:
                raise
            raise TargetError(*self._explain(self.folder(step), problem)) from error
        self._disk.remove_folder(self.partial)
        for old in self.steps()[: -self._keep]:
            self._disk.remove_folder(self.folder(old))

    def keep_only(self, steps: set[int]) -> None:
        """Remove the checkpoints of all other steps."""
        for step in self.steps():
            if step not in steps:
                self._disk.remove_folder(self.folder(step))

    def find(self, which: str) -> Checkpoint:
        """Return the latest checkpoint or a named one. Raises AdapterError if it is damaged, UsageError if absent."""
        steps = self.steps()
        if not steps:
            raise UsageError(f"{self.output}: holds no checkpoint to resume from. Train without ", Option("resume"))
        if which == LATEST:
            return self._checked(steps[-1])
        match = _NAME.fullmatch(Path(which).name)
        if match is None or int(match[1]) not in steps:
            names = ", ".join(f"checkpoint-{step}" for step in steps)
            raise UsageError(f"{self.output}: holds no {which}. There are {names}")
        return self._checked(int(match[1]))

    def last_whole(self) -> str | None:
        """Return the name of the latest checkpoint that is whole, if there is one."""
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.folder(step)).folder.name
            except AdapterError:
                continue
        return None

    def _checked(self, step: int) -> Checkpoint:
        try:
            return read_checkpoint(self.folder(step))
        except AdapterError as damaged:
            whole = self.last_whole()
            advice: Words = ("No other one is whole: train anew",)
            if whole is not None:
                advice = ("Use ", Option("resume", whole), ", which is whole")
            raise AdapterError(f"{damaged}. ", *advice) from None

    def _seal(self, folder: Path, step: int, facts: JsonObject) -> None:
        files: JsonObject = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                descriptor = self._disk.open_for_writing(path)
                try:
                    self._disk.sync(descriptor, path)
                    nbytes = os.fstat(descriptor).st_size
                    digest = xxh3_of_range(descriptor, 0, nbytes, path=path, error=ArtifactError)
                finally:
                    os.close(descriptor)
                files[path.relative_to(folder).as_posix()] = {"nbytes": nbytes, "xxh3": digest}
        seal: JsonObject = {"step": step, "files": files, "facts": facts}
        seal["seal_xxh3"] = xxh3(strict_json.dumps(seal).encode())
        self._disk.write_file(folder / SEAL_NAME, strict_json.dumps(seal, indent=2).encode())
        self._disk.sync_folder(folder)

    def _explain(self, final: Path, problem: str) -> Words:
        free = self._disk.free_nbytes(self.output)
        whole = self.last_whole()
        kept = "there is none yet" if whole is None else f"{whole} is whole"
        return (
            f"{final}: cannot be written: {problem} ({free:,} bytes are free). Of earlier ones, {kept}. Make room and ",
            *self._to_continue,
        )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its digest. Raises AdapterError naming the file."""
    path = folder / SEAL_NAME
    try:
        seal = strict_json.loads(path.read_bytes(), path=path, max_nbytes=_MAX_SEAL_NBYTES, error=ArtifactError)
    except FileNotFoundError:
        raise AdapterError(f"{path}: is missing: the checkpoint is not complete") from None
    except (OSError, ArtifactError) as problem:
        raise AdapterError(f"{path}: is damaged: {problem}") from None
    if not isinstance(seal, dict) or seal.pop("seal_xxh3", None) != xxh3(strict_json.dumps(seal).encode()):
        raise AdapterError(f"{path}: is damaged: its own digest differs")
    step, files, facts = seal.get("step"), seal.get("files"), seal.get("facts")
    if not isinstance(step, int) or not isinstance(files, dict) or not isinstance(facts, dict):
        raise AdapterError(f"{path}: is damaged: step, files or facts are missing")
    for name, record in files.items():
        if not isinstance(record, dict) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise AdapterError(f"{path}: is damaged: {name!r} is no file of the checkpoint")
        if not isinstance(record.get("nbytes"), int) or not isinstance(record.get("xxh3"), str):
            raise AdapterError(f"{path}: is damaged: {name!r} has no size or digest")
        _check_file(folder / name, record)
    return Checkpoint(folder, step, facts)


def _check_file(path: Path, record: JsonObject) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as problem:
        raise AdapterError(f"{path}: cannot be read: {problem.strerror}") from None
    try:
        nbytes = os.fstat(descriptor).st_size
        if nbytes != record["nbytes"]:
            raise AdapterError(f"{path}: is damaged: {nbytes:,} bytes, expected {record['nbytes']:,}")
        if xxh3_of_range(descriptor, 0, nbytes, path=path, error=ArtifactError) != record["xxh3"]:
            raise AdapterError(f"{path}: is damaged: its digest differs")
    finally:
        os.close(descriptor)


def disk_problem(error: BaseException) -> str | None:
    """Return what a disk said when torch or safetensors could not write a file; None for errors of other kinds.

    torch raises a RuntimeError of its zip writer while it handles what the system said, if it does not swallow that.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        cause = error.__context__
        return (cause.strerror or str(cause)) if isinstance(cause, OSError) else "the file system took no more bytes"
    return None
