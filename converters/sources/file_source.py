"""A source whose tensors are in files; shared by the safetensors, PyTorch and GGUF sources."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.checkpoint_folder import CheckpointFiles
from qformat.converters.sources.left_out import left_out
from qformat.converters.sources.source import PackedWeight

INDEX_WINS = "index_wins"
"""Member of the manifest's record of the source: the index decided which tensors count."""

_Files = TypeVar("_Files", bound=CheckpointFiles)


class FileSource(ABC, Generic[_Files]):
    """The files of a checkpoint. A subclass opens them, lists their tensors and reads these."""

    kind = ""
    packed: Mapping[str, PackedWeight] = {}

    def __init__(self, files: _Files) -> None:
        self._files = files
        self.location = files.path
        self.state_when_opened = files.state_when_opened

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the files, one sentence each."""
        return self._files.notes

    @property
    def left_out(self) -> Mapping[str, str]:
        """Why entries of the directory are neither read nor carried over, keyed by name."""
        return left_out(self._files, self._weight_files())

    def _how_read(self) -> JsonObject:
        """Return what the manifest records about options of reading, so that a comparison reads in the same way."""
        return {INDEX_WINS: True} if self._files.index_wins else {}

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def state(self) -> JsonObject:
        """Return a value that stays equal as long as no file is changed."""
        return self._files.state()

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""
        return self._files.read_side_file(name)

    @abstractmethod
    def _weight_files(self) -> list[str]:
        """Return the names of the files that hold the tensors, and of their index."""

    def _digest(self, lines: Iterable[str], side_files: Iterable[str]) -> str:
        """Return the SHA-256 of text lines that describe the tensors, and of the given side files."""
        digest = hashlib.sha256("\n".join(lines).encode())
        for name in side_files:
            digest.update(f"\n{name} ".encode() + hashlib.sha256(self.read_side_file(name)).digest())
        return digest.hexdigest()
