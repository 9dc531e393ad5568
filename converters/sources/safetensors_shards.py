"""The safetensors source: a directory with `config.json` and `model.safetensors`, or shards and their index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qformat import strict_json
from qformat.artifact import header
from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.checkpoint_folder import CheckpointFiles, CheckpointFolder
from qformat.converters.sources.file_source import FileSource
from qformat.converters.sources.source import SourceTensor
from qformat.errors import Reason, SourceError
from qformat.names import INDEX_NAME, SINGLE_SHARD_NAME


class SafetensorsShards(FileSource[CheckpointFiles]):
    """A checkpoint in safetensors files. Opening reads and checks every header but no weights."""

    kind = "safetensors"

    def __init__(self, files: Path | CheckpointFiles) -> None:
        super().__init__(CheckpointFolder(files) if isinstance(files, Path) else files)
        try:
            self.config = self._files.read_config()
            self._headers = self._open_shards()
            self._entries = {
                name: (shard, entry)
                for shard, parsed in self._headers.items()
                for name, entry in parsed.tensors.items()
            }
            self.tensors: Mapping[str, SourceTensor] = {
                name: SourceTensor(name, entry.dtype, entry.shape, shard)
                for name, (shard, entry) in self._entries.items()
            }
            self.side_files: Mapping[str, int] = self._files.list_side_files()
        except BaseException:
            self.close()
            raise

    def describe(self) -> JsonObject:
        """Return the kind and the shards' names and sizes, as the manifest records them."""
        files: JsonObject = {name: {"nbytes": parsed.file_nbytes} for name, parsed in sorted(self._headers.items())}
        return {"kind": self.kind, "files": files}

    def fingerprint(self) -> str:
        """Return the SHA-256 of config, headers and side files."""
        lines = [strict_json.dumps(self.config, python_numbers=True)]
        for shard, parsed in sorted(self._headers.items()):
            lines.append(f"{shard} {parsed.file_nbytes}")
            lines += [f"{entry.name} {entry.dtype} {entry.shape} {entry.start}" for entry in parsed.tensors.values()]
        return self._digest(lines, self.side_files)

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of a tensor.

        Args:
            tensor: The tensor to read.
            offset: Offset of the first byte in the tensor.
            out: Buffer to fill.
        """
        shard, entry = self._entries[tensor.name]
        self._files.read_into(shard, entry.start + offset, out)

    def _weight_files(self) -> list[str]:
        return [*self._headers, INDEX_NAME]

    def _open_shards(self) -> dict[str, header.Header]:
        weight_map = self._read_index()
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_SHARD_NAME]
        headers = self._files.read_headers(names)
        if not any(parsed.tensors for parsed in headers.values()):
            raise SourceError(Reason.HEADER_SYNTAX, self.location / names[0], "contains no tensor")
        self._files.check_shards({name: parsed.tensors for name, parsed in headers.items()}, INDEX_NAME, weight_map)
        return headers

    def _read_index(self) -> dict[str, str] | None:
        weight_map = self._files.read_weight_map(INDEX_NAME)
        if weight_map is None or SINGLE_SHARD_NAME in weight_map.values():
            return weight_map
        if self._files.has(SINGLE_SHARD_NAME):
            raise SourceError(
                Reason.INDEX_MISMATCH,
                self.location / INDEX_NAME,
                f"exists together with {SINGLE_SHARD_NAME}, so it is unclear which one is the checkpoint",
                next_step="Remove the one that is not",
            )
        return weight_map
