"""Writes, verifies and removes the checkpoints of a training.

A checkpoint is written to a temporary directory and renamed when it is complete. Every file has a digest.

    OUTPUT/checkpoint-20/            adapter, optimizer, schedule, random states, position; digests in checkpoint.json
    OUTPUT/partial/checkpoint-30/    checkpoint being written, or left by a crash: never read, removed by the next write
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError

from qformat import strict_json
from qformat.artifact.digests import xxh3, xxh3_of_range
from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.errors import AdapterError, ArtifactError, Option, QformatError, TargetError, UsageError, Words, first_line

SEAL_NAME = "checkpoint.json"
PARTIAL_NAME = "partial"
LOCK_NAME = "lock"
LATEST = "latest"

_NAME = re.compile(r"checkpoint-([0-9]{1,12})")
_MAX_SEAL_NBYTES = 2**20
_RESUME: Words = ("resume with ", Option("resume", LATEST))


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
        disk: Performs the file operations.
        to_continue: Advice on how to resume after the disk was full, the end of an error message.
    """

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
        """Directory in which checkpoints are written before they are renamed."""
        return self.output / PARTIAL_NAME

    def steps(self) -> list[int]:
        """Return the steps of the existing checkpoints in ascending order."""
        if not self.output.is_dir():
            return []
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
        descriptor = self._disk.open_for_writing(self.output / LOCK_NAME)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TargetError(
                    f"{self.output}: another training is writing to this directory. Wait for it to end, or choose "
                    "another directory"
                ) from None
            yield
            self._disk.remove_file(self.output / LOCK_NAME)
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
        """Remove the checkpoints of all steps except these."""
        for step in self.steps():
            if step not in steps:
                self._disk.remove_folder(self.folder(step))

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
            intact = self.last_intact()
            advice: Words = ("No other checkpoint is intact. Train again in another directory",)
            if intact is not None:
                advice = ("Use ", Option("resume", intact), ", which is intact")
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
        intact = self.last_intact()
        kept = "No earlier checkpoint exists" if intact is None else f"{intact} is intact"
        return (
            f"{final}: cannot be written: {problem} ({free:,} bytes are free). {kept}. Make room and ",
            *self._to_continue,
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
        seal = strict_json.loads(path.read_bytes(), path=path, max_nbytes=_MAX_SEAL_NBYTES, error=ArtifactError)
    except FileNotFoundError:
        raise AdapterError(f"{path}: is missing: the checkpoint is not complete") from None
    except (OSError, ArtifactError) as problem:
        raise AdapterError(f"{path}: is damaged: {problem}") from None
    if not isinstance(seal, dict) or seal.pop("seal_xxh3", None) != xxh3(strict_json.dumps(seal).encode()):
        raise AdapterError(f"{path}: is damaged: its content does not match its own digest")
    step, files, facts = seal.get("step"), seal.get("files"), seal.get("facts")
    if not isinstance(step, int) or not isinstance(files, dict) or not isinstance(facts, dict):
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
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as problem:
        raise AdapterError(f"{path}: cannot be read: {problem.strerror}") from None
    try:
        nbytes = os.fstat(descriptor).st_size
        if nbytes != record["nbytes"]:
            raise AdapterError(f"{path}: is damaged: found {nbytes:,} bytes, expected {record['nbytes']:,}")
        if xxh3_of_range(descriptor, 0, nbytes, path=path, error=ArtifactError) != record["xxh3"]:
            raise AdapterError(f"{path}: is damaged: its content does not match its digest")
    finally:
        os.close(descriptor)


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
