"""The safetensors source: a folder with `model.safetensors`, or shards and their index, and a `config.json`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from qformat import strict_json
from qformat.artifact import header
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES
from qformat.artifact.manifest import MANIFEST_NAME, JsonObject
from qformat.artifact.regular_files import check_plain_name, open_regular, read_exactly, read_small
from qformat.converters.side_files import MAX_SIDE_FILE_NBYTES, is_side_file
from qformat.converters.source import SourceTensor
from qformat.errors import Reason, SourceError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

_OTHER_FORMATS = (
    ("pytorch_model", ".bin", "PyTorch .bin weights"),
    ("", ".gguf", "a GGUF file"),
    ("", ".pt", "PyTorch .pt weights"),
    ("", ".msgpack", "Flax weights"),
    ("", ".h5", "TensorFlow weights"),
)


class SafetensorsShards:
    """A local checkpoint in safetensors files. Opening reads and checks every header and no weight."""

    kind = "safetensors"

    def __init__(self, folder: Path) -> None:
        if not os.path.isdir(folder):
            raise SourceError(
                Reason.MISSING_FILE,
                folder,
                "there is no such folder",
                next_step="Give the folder of a checkpoint",
            )
        self.location = folder
        self.state_when_opened: JsonObject = {}
        self._open_files = ExitStack()
        self._descriptors: dict[str, int] = {}
        try:
            self._refuse_artifact()
            self.config = self._read_config()
            self._headers = self._open_shards()
            self._entries = {
                name: (shard, entry)
                for shard, parsed in self._headers.items()
                for name, entry in parsed.tensors.items()
            }
            self.tensors: Mapping[str, SourceTensor] = {
                name: SourceTensor(name, entry.dtype, entry.shape, entry.nbytes, shard)
                for name, (shard, entry) in self._entries.items()
            }
            self.side_files: Mapping[str, int] = self._list_side_files()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the shards."""
        self._open_files.close()

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
        return {name: self._state_of(name) for name in sorted(self.state_when_opened)}

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `offset` on."""
        shard, entry = self._entries[tensor.name]
        read_exactly(self._descriptors[shard], entry.start + offset, out, path=self.location / shard, error=SourceError)

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""
        return read_small(self.location, name, max_nbytes=MAX_SIDE_FILE_NBYTES, error=SourceError)

    def _state_of(self, name: str) -> list[strict_json.Json] | None:
        try:
            status = os.stat(self._descriptors.get(name, self.location / name))
        except OSError:
            return None
        return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]

    def _refuse_artifact(self) -> None:
        if os.path.lexists(self.location / MANIFEST_NAME):
            raise SourceError(
                Reason.ALREADY_QUANTIZED,
                self.location,
                "is a qformat artifact already",
                next_step="Convert the 16-bit checkpoint that it was made from",
            )

    def _read_config(self) -> JsonObject:
        path = self.location / CONFIG_NAME
        self.state_when_opened[CONFIG_NAME] = self._state_of(CONFIG_NAME)
        data = read_small(self.location, CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=SourceError)
        config = strict_json.loads(data, path=path, max_nbytes=MAX_CONFIG_NBYTES, error=SourceError)
        if not isinstance(config, dict):
            raise SourceError(Reason.CONFIG_FIELD, path, "not a JSON object")
        quantization = config.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise SourceError(
                Reason.ALREADY_QUANTIZED,
                path,
                f"the checkpoint is quantized already (quant_method {method!r})",
                field="quantization_config",
                next_step="Convert the 16-bit checkpoint that it was made from",
            )
        return config

    def _open_shards(self) -> dict[str, header.Header]:
        weight_map = self._read_index()
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
        headers: dict[str, header.Header] = {}
        owner: dict[str, str] = {}
        for name in names:
            descriptor = self._open_files.enter_context(open_regular(self.location, name, error=SourceError))
            self._descriptors[name] = descriptor
            self.state_when_opened[name] = self._state_of(name)
            parsed = header.read(descriptor, self.location / name, error=SourceError)
            for tensor in parsed.tensors:
                if tensor in owner:
                    raise SourceError(
                        Reason.DUPLICATE_TENSOR, parsed.path, f"is in {owner[tensor]}, too", tensor=tensor
                    )
                owner[tensor] = name
            headers[name] = parsed
        if weight_map is not None:
            self._check_index(weight_map, owner)
        return headers

    def _read_index(self) -> dict[str, str] | None:
        path = self.location / INDEX_NAME
        if not os.path.lexists(path):
            if not os.path.lexists(self.location / SINGLE_NAME):
                raise self._no_weights()
            return None
        self.state_when_opened[INDEX_NAME] = self._state_of(INDEX_NAME)
        data = read_small(self.location, INDEX_NAME, max_nbytes=MAX_INDEX_NBYTES, error=SourceError)
        index = strict_json.loads(data, path=path, max_nbytes=MAX_INDEX_NBYTES, error=SourceError)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(Reason.INDEX_MISMATCH, path, "missing or not an object", field="weight_map")
        checked: dict[str, str] = {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str):
                raise SourceError(Reason.INDEX_MISMATCH, path, "not a file name", tensor=tensor, field="weight_map")
            check_plain_name(shard, path=path, error=SourceError)
            checked[tensor] = shard
        if SINGLE_NAME not in checked.values() and os.path.lexists(self.location / SINGLE_NAME):
            raise SourceError(
                Reason.INDEX_MISMATCH,
                path,
                f"stands beside {SINGLE_NAME}: it is not clear which one is the checkpoint",
                next_step="Remove the one that is not",
            )
        return checked

    def _check_index(self, weight_map: dict[str, str], owner: dict[str, str]) -> None:
        path = self.location / INDEX_NAME
        for tensor, shard in weight_map.items():
            if owner.get(tensor) != shard:
                found = f"it is in {owner[tensor]}" if tensor in owner else "no shard has it"
                raise SourceError(Reason.INDEX_MISMATCH, path, f"expected in {shard}, but {found}", tensor=tensor)
        for tensor, shard in owner.items():
            if tensor not in weight_map:
                raise SourceError(Reason.INDEX_MISMATCH, self.location / shard, "is not in the index", tensor=tensor)

    def _no_weights(self) -> SourceError:
        names = sorted(entry.name for entry in self.location.iterdir())
        for prefix, suffix, meaning in _OTHER_FORMATS:
            found = [name for name in names if name.startswith(prefix) and name.endswith(suffix)]
            if found:
                return SourceError(
                    Reason.UNSUPPORTED_SOURCE,
                    self.location / found[0],
                    f"{meaning}: this version converts safetensors checkpoints only",
                    next_step="Save the model with save_pretrained, which writes safetensors, and convert that",
                )
        others = [name for name in names if name.endswith(".safetensors")]
        hint = f"; there is {', '.join(others[:5])}" if others else ""
        return SourceError(Reason.MISSING_FILE, self.location, f"has neither {INDEX_NAME} nor {SINGLE_NAME}{hint}")

    def _list_side_files(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in sorted(self.location.iterdir()):
            if is_side_file(entry.name):
                with open_regular(self.location, entry.name, error=SourceError) as descriptor:
                    found[entry.name] = os.fstat(descriptor).st_size
                    self.state_when_opened[entry.name] = self._state_of(entry.name)
        return found
