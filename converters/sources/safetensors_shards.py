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
from qformat.errors import Option, Reason, SourceError
from qformat.names import INDEX_NAME, SINGLE_SHARD_NAME


class SafetensorsShards(FileSource[CheckpointFiles]):
    """A checkpoint in safetensors files. Opening reads and checks every header but no weights."""

    kind = "safetensors"

    def __init__(self, files: Path | CheckpointFiles, *, index_wins: bool = False) -> None:
        super().__init__(CheckpointFolder(files, index_wins=index_wins) if isinstance(files, Path) else files)
        try:
            self.config = self._files.read_config()
            self._headers, names = self._open_shards()
            self._entries = {
                name: (shard, self._headers[shard].tensors[name]) for shard in self._headers for name in names[shard]
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
        return {"kind": self.kind, "files": files, **self._how_read()}

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

    def _open_shards(self) -> tuple[dict[str, header.Header], dict[str, list[str]]]:
        """Return the headers of all shards, and the names of the tensors that count in each."""
        weight_map = self._read_index()
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_SHARD_NAME]
        headers = self._files.read_headers(names)
        if not any(parsed.tensors for parsed in headers.values()):
            raise SourceError(Reason.HEADER_SYNTAX, self.location / names[0], "contains no tensor")
        stored = {name: parsed.tensors for name, parsed in headers.items()}
        return headers, self._files.names_by_shard(stored, INDEX_NAME, weight_map)

    def _read_index(self) -> dict[str, str] | None:
        weight_map = self._files.read_weight_map(INDEX_NAME)
        if weight_map is None or SINGLE_SHARD_NAME in weight_map.values():
            return weight_map
        if self._files.has(SINGLE_SHARD_NAME) and not self._files.index_wins:
            raise SourceError(
                Reason.INDEX_MISMATCH,
                self.location / INDEX_NAME,
                f"exists together with {SINGLE_SHARD_NAME}, so it is unclear which one is the checkpoint",
                next_step=(
                    "Remove the one that is not, or read what the index names with ",
                    Option("index_wins", True),
                ),
            )
        return weight_map
