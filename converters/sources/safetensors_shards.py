"""The safetensors source: a folder with `model.safetensors`, or shards and their index, and a `config.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from qformat import strict_json
from qformat.artifact import header
from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.checkpoint_folder import CheckpointFiles, CheckpointFolder
from qformat.converters.sources.source import PackedWeight, SourceTensor
from qformat.errors import Reason, SourceError
from qformat.names import INDEX_NAME, SINGLE_SHARD_NAME

_OTHER_FORMATS = (
    (".pt", "PyTorch .pt weights"),
    (".msgpack", "Flax weights"),
    (".h5", "TensorFlow weights"),
)


class SafetensorsShards:
    """A checkpoint in safetensors files. Opening reads and checks every header and no weight."""

    kind = "safetensors"
    packed: Mapping[str, PackedWeight] = {}

    def __init__(self, files: Path | CheckpointFiles) -> None:
        self._folder = CheckpointFolder(files) if isinstance(files, Path) else files
        self.location = self._folder.path
        self.state_when_opened = self._folder.state_when_opened
        try:
            self.config = self._folder.read_config()
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
            self.side_files: Mapping[str, int] = self._folder.list_side_files()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the shards."""
        self._folder.close()

    def describe(self) -> JsonObject:
        """Return kind and the shards' names and sizes."""
        files: JsonObject = {name: {"nbytes": parsed.file_nbytes} for name, parsed in sorted(self._headers.items())}
        return {"kind": self.kind, "files": files}

    def fingerprint(self) -> str:
        """Return the SHA-256 of config, headers and side files."""
        digest = hashlib.sha256(strict_json.dumps(self.config).encode("utf-8"))
        for shard, parsed in sorted(self._headers.items()):
            digest.update(f"\n{shard} {parsed.file_nbytes}".encode())
            for entry in parsed.tensors.values():
                digest.update(f"\n{entry.name} {entry.dtype} {entry.shape} {entry.start}".encode())
        for name in self.side_files:
            digest.update(f"\n{name} ".encode() + hashlib.sha256(self.read_side_file(name)).digest())
        return digest.hexdigest()

    def state(self) -> JsonObject:
        """Return inode, size and times of each file that was opened; null for one that is gone."""
        return self._folder.state()

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `offset` on."""
        shard, entry = self._entries[tensor.name]
        self._folder.read_into(shard, entry.start + offset, out)

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""
        return self._folder.read_side_file(name)

    def _open_shards(self) -> dict[str, header.Header]:
        weight_map = self._read_index()
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_SHARD_NAME]
        owner: dict[str, str] = {}
        headers = self._folder.read_headers(names)
        for name, parsed in headers.items():
            for tensor in parsed.tensors:
                if tensor in owner:
                    raise SourceError(
                        Reason.DUPLICATE_TENSOR, parsed.path, f"is in {owner[tensor]}, too", tensor=tensor
                    )
                owner[tensor] = name
        if weight_map is not None:
            self._folder.check_weight_map(INDEX_NAME, weight_map, owner)
        return headers

    def _read_index(self) -> dict[str, str] | None:
        weight_map = self._folder.read_weight_map(INDEX_NAME)
        if weight_map is None:
            if not self._folder.has(SINGLE_SHARD_NAME):
                raise self._no_weights()
        elif SINGLE_SHARD_NAME not in weight_map.values() and self._folder.has(SINGLE_SHARD_NAME):
            raise SourceError(
                Reason.INDEX_MISMATCH,
                self.location / INDEX_NAME,
                f"stands beside {SINGLE_SHARD_NAME}: it is not clear which one is the checkpoint",
                next_step="Remove the one that is not",
            )
        return weight_map

    def _no_weights(self) -> SourceError:
        names = self._folder.names()
        for suffix, meaning in _OTHER_FORMATS:
            found = [name for name in names if name.endswith(suffix)]
            if found:
                return SourceError(
                    Reason.UNSUPPORTED_SOURCE,
                    self.location / found[0],
                    f"{meaning}: no kind of source that this version converts (`qformat info` lists them)",
                    next_step="Save the model with save_pretrained, which writes safetensors, and convert that",
                )
        others = [name for name in names if name.endswith(".safetensors")]
        hint = f"; there is {', '.join(others[:5])}" if others else ""
        return SourceError(
            Reason.MISSING_FILE, self.location, f"has neither {INDEX_NAME} nor {SINGLE_SHARD_NAME}{hint}"
        )
