"""Writes, verifies and removes the checkpoints of a training.

A checkpoint is written to a temporary directory and renamed when it is complete. Every file has a digest.

    OUTPUT/checkpoint-20/            adapter, optimizer, schedule, random states, position; digests in checkpoint.json
    OUTPUT/partial/checkpoint-30/    checkpoint being written, or left by a crash: never read, removed by the next write
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError

from qformat import strict_json
from qformat.artifact.digests import xxh3, xxh3_of_range
from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.output_kind import reading_output
from qformat.errors import AdapterError, ArtifactError, Option, QformatError, TargetError, UsageError, Words, first_line
from qformat.named_files import open_named, read_named

SEAL_NAME = "checkpoint.json"
PARTIAL_NAME = "partial"
LOCK_NAME = "lock"
LATEST = "latest"

_NAME = re.compile(r"checkpoint-([0-9]{1,12})")
_MAX_SEAL_NBYTES = 2**20
_RESUME: Words = ("run the same command again, with ", Option("resume", LATEST), " if a checkpoint exists")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in which every file matches its digest.

    Attributes:
        folder: Directory of the checkpoint.
        step: Number of completed optimizer steps.
        facts: Facts about the training that the checkpoint records.
    """

    folder: Path
    step: int
    facts: JsonObject


class CheckpointFolder:
    """The checkpoints in one output directory.

    Args:
        output: Output directory of the training.
        keep: Number of most recent checkpoints to keep.
        disk: Performs the file operations. Its advice in messages is how to resume. Defaults to that of a training.
    """

    def __init__(self, output: Path, *, keep: int, disk: Disk | None = None) -> None:
        self.output = output
        self.disk = disk or Disk(to_continue=_RESUME)
        self._keep = keep

    @property
    def partial(self) -> Path:
        """Directory in which checkpoints are written before they are renamed."""
        return self.output / PARTIAL_NAME

    def steps(self) -> list[int]:
        """Return the steps of the existing checkpoints in ascending order."""
        if not os.path.isdir(self.output):
            return []
        with reading_output(self.output):
            found = (_NAME.fullmatch(entry.name) for entry in self.output.iterdir() if entry.is_dir())
            return sorted(int(match[1]) for match in found if match)

    def folder(self, step: int) -> Path:
        """Return the directory of the checkpoint of a step."""
        return self.output / f"checkpoint-{step}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the output directory against other trainings.

        Raises:
            TargetError: Another process holds the lock.
        """
        descriptor = self.disk.open_for_writing(self.output / LOCK_NAME)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TargetError(
                    f"{self.output}: another training is writing to this directory. Wait for it to end, or choose "
                    "another directory"
                ) from None
            try:
                yield
            finally:
                with suppress(TargetError):  # a lock file that stays has no effect
                    self.disk.remove_file(self.output / LOCK_NAME)
        finally:
            os.close(descriptor)

    @contextmanager
    def writing(self, step: int, facts: JsonObject) -> Iterator[Path]:
        """Write a checkpoint: yield a directory to fill, then seal it, rename it and remove the oldest checkpoints.

        Args:
            step: Number of completed optimizer steps.
            facts: Facts about the training to record.

        Yields:
            An empty directory for the files of the checkpoint.

        Raises:
            TargetError: The disk is full or cannot be written. Existing checkpoints stay intact.
        """
        folder = self.partial / f"checkpoint-{step}"
        self.disk.remove_folder(self.partial)
        self.disk.make_folder(self.partial)
        self.disk.make_folder(folder)
        try:
            yield folder
            self._seal(folder, step, facts)
            self.disk.replace_folder(folder, self.folder(step))
        except BaseException as error:
            with suppress(TargetError):
                self.disk.remove_folder(self.partial)
            problem = disk_problem(error)
            if problem is None:
                raise
            raise TargetError(*self._explain(self.folder(step), problem)) from error
        self.disk.remove_folder(self.partial)
        for old in self.steps()[: -self._keep]:
            self.disk.remove_folder(self.folder(old))

    def keep_only(self, steps: set[int]) -> None:
        """Remove the checkpoints of all steps except these."""
        for step in self.steps():
            if step not in steps:
                self.disk.remove_folder(self.folder(step))

    def find(self, which: str) -> Checkpoint:
        """Return the latest checkpoint ("latest") or a named one.

        Raises:
            AdapterError: The checkpoint is damaged.
            UsageError: The checkpoint does not exist.
        """
        steps = self.steps()
        if not steps:
            raise UsageError(f"{self.output}: has no checkpoint to resume from. Train without ", Option("resume"))
        if which == LATEST:
            return self._checked(steps[-1])
        match = _NAME.fullmatch(Path(which).name)
        if match is None or int(match[1]) not in steps:
            names = ", ".join(f"checkpoint-{step}" for step in steps)
            raise UsageError(f"{self.output}: {which} does not exist. Existing checkpoints: {names}")
        return self._checked(int(match[1]))

    def last_intact(self) -> str | None:
        """Return the name of the latest intact checkpoint, or None."""
        found = self.intact(lambda _: None)
        return found[0].folder.name if found else None

    def intact(self, on_damage: Callable[[AdapterError], None]) -> list[Checkpoint]:
        """Return all intact checkpoints, the latest first.

        Args:
            on_damage: Called with the error of each damaged checkpoint.
        """
        found = []
        for step in reversed(self.steps()):
            try:
                found.append(read_checkpoint(self.folder(step)))
            except AdapterError as damaged:
                on_damage(damaged)
        return found

    def _checked(self, step: int) -> Checkpoint:
        try:
            return read_checkpoint(self.folder(step))
        except AdapterError as damaged:
            intact = self.last_intact()
            advice: Words = ("No other checkpoint is intact. Train again in another directory",)
            if intact is not None:
                advice = ("Use ", Option("resume", intact), ", which is intact")
            raise AdapterError(f"{damaged}. ", *advice) from None

    def _seal(self, folder: Path, step: int, facts: JsonObject) -> None:
        files: JsonObject = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                descriptor = self.disk.open_for_writing(path)
                try:
                    self.disk.sync(descriptor, path)
                    nbytes = os.fstat(descriptor).st_size
                    digest = xxh3_of_range(descriptor, 0, nbytes, path=path, error=ArtifactError)
                finally:
                    os.close(descriptor)
                files[path.relative_to(folder).as_posix()] = {"nbytes": nbytes, "xxh3": digest}
        seal: JsonObject = {"step": step, "files": files, "facts": facts}
        seal["seal_xxh3"] = xxh3(strict_json.dumps(seal).encode())
        self.disk.write_file(folder / SEAL_NAME, strict_json.dumps(seal, indent=2).encode())
        self.disk.sync_folder(folder)

    def _explain(self, final: Path, problem: str) -> Words:
        free = self.disk.free_nbytes(self.output)
        intact = self.last_intact()
        kept = "No earlier checkpoint exists" if intact is None else f"{intact} is intact"
        return (
            f"{final}: cannot be written: {problem} ({free:,} bytes are free). {kept}. Make room and ",
            *self.disk.to_continue,
        )


@contextmanager
def restoring(file: Path) -> Iterator[None]:
    """Translate the errors of restoring a state from a file of a checkpoint. Its digest is right, its content is not.

    Args:
        file: File of the checkpoint, for the message.

    Raises:
        AdapterError: The content is not the state of this training.
    """
    try:
        yield
    except (QformatError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # torch, transformers and safetensors raise errors of many types
        raise AdapterError(
            f"{file}: is not the state of this training, so another program wrote it: {first_line(problem)}. Train "
            "again in another directory"
        ) from problem


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and compare every file with its digest.

    Raises:
        AdapterError: A file is missing or damaged. The message starts with its path.
    """
    path = folder / SEAL_NAME
    try:
        seal = strict_json.loads(
            read_named(path, max_nbytes=_MAX_SEAL_NBYTES), path=path, max_nbytes=_MAX_SEAL_NBYTES, error=ArtifactError
        )
    except FileNotFoundError:
        raise AdapterError(f"{path}: is missing: the checkpoint is not complete") from None
    except OSError as problem:
        raise AdapterError(f"{path}: cannot be read: {problem.strerror}") from None
    except ArtifactError as problem:
        raise AdapterError(f"{path}: is damaged: {problem}") from None
    if not isinstance(seal, dict) or seal.pop("seal_xxh3", None) != xxh3(strict_json.dumps(seal).encode()):
        raise AdapterError(f"{path}: is damaged: its content does not match its own digest")
    step, files, facts = seal.get("step"), seal.get("files"), seal.get("facts")
    if type(step) is not int or not isinstance(files, dict) or not isinstance(facts, dict):
        raise AdapterError(f"{path}: is damaged: step, files or facts are missing")
    for name, record in files.items():
        if not isinstance(record, dict) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise AdapterError(f"{path}: is damaged: {name!r} is not a file of the checkpoint")
        if not isinstance(record.get("nbytes"), int) or not isinstance(record.get("xxh3"), str):
            raise AdapterError(f"{path}: is damaged: {name!r} has no size or digest")
        _check_file(folder / name, record)
    return Checkpoint(folder, step, facts)


def _check_file(path: Path, record: JsonObject) -> None:
    try:
        file = open_named(path)
    except OSError as problem:
        raise AdapterError(f"{path}: cannot be read: {problem.strerror}") from None
    with file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes != record["nbytes"]:
            raise AdapterError(f"{path}: is damaged: found {nbytes:,} bytes, expected {record['nbytes']:,}")
        if xxh3_of_range(file.fileno(), 0, nbytes, path=path, error=ArtifactError) != record["xxh3"]:
            raise AdapterError(f"{path}: is damaged: its content does not match its digest")


def disk_problem(error: BaseException) -> str | None:
    """Return the disk error behind an exception of torch or safetensors, or None for errors of other kinds.

    torch reports a failed write as a RuntimeError of its zip writer. The system's error is its context, or is lost.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        cause = error.__context__
        return (cause.strerror or str(cause)) if isinstance(cause, OSError) else "the file system rejected the write"
    return None
