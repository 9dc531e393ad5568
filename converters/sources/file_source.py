"""A source whose tensors lie in files: what the safetensors, PyTorch and GGUF sources share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.checkpoint_folder import CheckpointFiles
from qformat.converters.sources.source import PackedWeight

_Files = TypeVar("_Files", bound=CheckpointFiles)


class FileSource(Generic[_Files]):
    """The files of a checkpoint. A subclass opens them, says which tensors they hold, and reads those."""

    kind = ""
    packed: Mapping[str, PackedWeight] = {}

    def __init__(self, files: _Files) -> None:
        self._files = files
        self.location = files.path
        self.state_when_opened = files.state_when_opened

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def state(self) -> JsonObject:
        """Return inode, size and times of each file that was opened; null for one that is gone."""
        return self._files.state()

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""
        return self._files.read_side_file(name)

    def _digest(self, lines: Iterable[str], side_files: Iterable[str]) -> str:
        """Return the SHA-256 of lines of text, which describe the tensors, and of side files, by their names."""
        digest = hashlib.sha256("\n".join(lines).encode())
        for name in side_files:
            digest.update(f"\n{name} ".encode() + hashlib.sha256(self.read_side_file(name)).digest())
        return digest.hexdigest()
