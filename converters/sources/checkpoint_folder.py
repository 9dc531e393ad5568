"""The files of a checkpoint, wherever they are stored; every kind of source reads through this interface.

`CheckpointFolder` is a local directory. It records the state of each file when it is first opened, so that a conversion
can check at its end that nothing was changed.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from qformat import strict_json
from qformat.artifact import header
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES, max_nbytes_of
from qformat.artifact.manifest import JsonObject
from qformat.artifact.reading.regular_files import check_plain_name, read_exactly
from qformat.artifact.reading.side_files import is_side_file
from qformat.artifact.sources.source_files import open_source_file, read_source_file
from qformat.errors import Option, Reason, SourceError
from qformat.names import CONFIG_NAME, MANIFEST_NAME

_INDEX_WINS = (
    "Fetch index and shards again from one revision, or ignore such tensors with ",
    Option("index_wins", True),
)


class CheckpointFiles(ABC):
    """Files that are read by name. Every problem with a file raises SourceError.

    Attributes:
        path: Location of the files, for messages.
        state_when_opened: State of each file before it was first read, see `state`.
        notes: What a user should know about the files that were read, one sentence each.
        index_wins: Whether tensors that the index does not assign to their shard are ignored instead of rejected.
    """

    path: Path
    state_when_opened: JsonObject
    notes: tuple[str, ...] = ()
    index_wins: bool = False

    @abstractmethod
    def close(self) -> None:
        """Close everything that is open."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all entries, sorted."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Return the names of the directories among the entries, sorted."""

    @abstractmethod
    def read_small(self, name: str, *, max_nbytes: int) -> bytes:
        """Return the bytes of a small file.

        Args:
            name: Name of the file.
            max_nbytes: Largest size in bytes that is accepted.
        """

    @abstractmethod
    def read_headers(self, names: Sequence[str]) -> dict[str, header.Header]:
        """Open safetensors files and return their headers. Afterwards `read_into` can read these files."""

    @abstractmethod
    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of an open file. Safe to call from several threads.

        Args:
            name: Name of the file.
            offset: Offset of the first byte in the file.
            out: Buffer to fill.
        """

    @abstractmethod
    def list_side_files(self) -> dict[str, int]:
        """Return the files to carry over into the artifact, with their sizes in bytes."""

    @abstractmethod
    def state(self) -> JsonObject:
        """Return a value that stays equal as long as no file is changed."""

    def has(self, name: str) -> bool:
        """Return whether an entry of that name exists, whatever its type."""
        return name in self.names()

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""
        return self.read_small(name, max_nbytes=max_nbytes_of(name))

    def read_json(self, name: str, *, max_nbytes: int) -> strict_json.Json:
        """Read a JSON file. What Python's json module reads beyond JSON is accepted with a note.

        Args:
            name: Name of the file.
            max_nbytes: Largest size in bytes that is accepted.
        """
        data = self.read_small(name, max_nbytes=max_nbytes)
        remarks: list[str] = []
        value = strict_json.loads(
            data, path=self.path / name, max_nbytes=max_nbytes, error=SourceError, remarks=remarks
        )
        self.notes = (*self.notes, *(note for text in remarks if (note := f"{name} {text}") not in self.notes))
        return value

    def read_config(self) -> JsonObject:
        """Read config.json. The directory of an artifact is rejected."""
        if self.has(MANIFEST_NAME):
            raise SourceError(
                Reason.ALREADY_QUANTIZED,
                self.path,
                "is already a qformat artifact",
                next_step="Convert the original 16-bit checkpoint",
            )
        config = self.read_json(CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES)
        if not isinstance(config, dict):
            raise SourceError(Reason.CONFIG_FIELD, self.path / CONFIG_NAME, "expected a JSON object")
        return config

    def read_weight_map(self, name: str) -> dict[str, str] | None:
        """Read an index and return the shard of each tensor, or None if the file does not exist."""
        path = self.path / name
        if not self.has(name):
            return None
        index = self.read_json(name, max_nbytes=MAX_INDEX_NBYTES)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(Reason.INDEX_MISMATCH, path, "is missing, empty or not an object", field="weight_map")
        checked: dict[str, str] = {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str):
                raise SourceError(Reason.INDEX_MISMATCH, path, "is not a file name", tensor=tensor, field="weight_map")
            check_plain_name(shard, path=path, error=SourceError)
            checked[tensor] = shard
        return checked

    def names_by_shard(
        self, tensors: Mapping[str, Iterable[str]], index_name: str, weight_map: Mapping[str, str] | None
    ) -> dict[str, list[str]]:
        """Return the names of the tensors that count in each shard: all, or those of the index if `index_wins`.

        A tensor that is in two shards, and shards that do not match the index, are rejected otherwise.

        Args:
            tensors: Names of the tensors in each shard.
            index_name: File name of the index, for messages.
            weight_map: Shard of each tensor according to the index, or None without an index.
        """
        stored = {shard: list(names) for shard, names in tensors.items()}
        if self.index_wins and weight_map is not None:
            return self._names_of_index(stored, index_name, weight_map)
        owner: dict[str, str] = {}
        for shard, names in stored.items():
            for tensor in names:
                if tensor in owner:
                    problem = f"is also in {owner[tensor]}"
                    raise SourceError(
                        Reason.DUPLICATE_TENSOR, self.path / shard, problem, tensor=tensor,
                        next_step=None if weight_map is None else _INDEX_WINS,
                    )  # fmt: skip
                owner[tensor] = shard
        if weight_map is None:
            return stored
        self._refuse_missing(weight_map, owner, index_name)
        for tensor, shard in owner.items():
            if tensor not in weight_map:
                raise SourceError(
                    Reason.INDEX_MISMATCH, self.path / shard, "is not in the index", tensor=tensor,
                    next_step=_INDEX_WINS,
                )  # fmt: skip
        return stored

    def _names_of_index(
        self, stored: Mapping[str, list[str]], index_name: str, weight_map: Mapping[str, str]
    ) -> dict[str, list[str]]:
        counted = {shard: [name for name in names if weight_map.get(name) == shard] for shard, names in stored.items()}
        self._refuse_missing(weight_map, {n: shard for shard, names in counted.items() for n in names}, index_name)
        ignored = [name for shard, names in stored.items() for name in names if weight_map.get(name) != shard]
        if ignored:
            more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
            note = f"{ignored[0]}{more}: left out of a shard, because {index_name} does not assign it to that shard"
            self.notes = (*self.notes, note)
        return counted

    def _refuse_missing(self, weight_map: Mapping[str, str], owner: Mapping[str, str], index_name: str) -> None:
        path = self.path / index_name
        for tensor, shard in weight_map.items():
            if owner.get(tensor) != shard:
                found = f"it is in {owner[tensor]}" if tensor in owner else "no shard has it"
                raise SourceError(Reason.INDEX_MISMATCH, path, f"expected in {shard}, but {found}", tensor=tensor)


class CheckpointFolder(CheckpointFiles):
    """The files of a local directory."""

    def __init__(self, path: Path, *, index_wins: bool = False) -> None:
        if not os.path.isdir(path):
            raise SourceError(
                Reason.MISSING_FILE,
                path,
                "is not a directory" if os.path.lexists(path) else "does not exist",
                next_step="Give the directory of a checkpoint, or a Hub repository as owner/name",
            )
        self.path = path
        self.index_wins = index_wins
        self.state_when_opened: JsonObject = {}
        self._open_files = ExitStack()
        self._descriptors: dict[str, int] = {}

    def close(self) -> None:
        """Close every file."""
        self._open_files.close()

    def has(self, name: str) -> bool:
        """Return whether an entry of that name exists, whatever its type."""
        return os.path.lexists(self.path / name)

    def names(self) -> list[str]:
        """Return the names of all entries of the directory, sorted."""
        return sorted(os.listdir(self.path))

    def folders(self) -> list[str]:
        """Return the names of the directories among the entries, sorted."""
        return [name for name in self.names() if os.path.isdir(self.path / name)]

    def read_small(self, name: str, *, max_nbytes: int) -> bytes:
        """Return the bytes of a small regular file.

        Args:
            name: Name of the file.
            max_nbytes: Largest size in bytes that is accepted.
        """
        if name not in self.state_when_opened:
            self.state_when_opened[name] = self._state_of(name)
        return read_source_file(self.path, name, max_nbytes=max_nbytes, error=SourceError)

    def read_headers(self, names: Sequence[str]) -> dict[str, header.Header]:
        """Open safetensors files one after another and return their headers."""
        return {
            name: header.read(self.open(name), self.path / name, error=SourceError, of_artifact=False) for name in names
        }

    def open(self, name: str) -> int:
        """Open a regular file, keep it open, and return its descriptor."""
        descriptor = self._open_files.enter_context(open_source_file(self.path, name, error=SourceError))
        self._descriptors[name] = descriptor
        self.state_when_opened[name] = self._state_of(name)
        return descriptor

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of an open file. Safe to call from several threads.

        Args:
            name: Name of the file.
            offset: Offset of the first byte in the file.
            out: Buffer to fill.
        """
        read_exactly(self._descriptors[name], offset, out, path=self.path / name, error=SourceError)

    def list_side_files(self) -> dict[str, int]:
        """Return the files to carry over into the artifact, with their sizes in bytes."""
        found: dict[str, int] = {}
        for entry in sorted(self.path.iterdir()):
            if is_side_file(entry.name):
                with open_source_file(self.path, entry.name, error=SourceError) as descriptor:
                    found[entry.name] = os.fstat(descriptor).st_size
                    self.state_when_opened[entry.name] = self._state_of(entry.name)
        return found

    def state(self) -> JsonObject:
        """Return device, inode, size and times of each file that was opened, or null if it no longer exists."""
        return {name: self._state_of(name) for name in sorted(self.state_when_opened)}

    def _state_of(self, name: str) -> list[strict_json.Json] | None:
        try:
            status = os.stat(self._descriptors.get(name, self.path / name))
        except OSError:
            return None
        return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
