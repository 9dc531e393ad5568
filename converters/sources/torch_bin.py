"""The PyTorch source: `pytorch_model.bin`, or shards and their index, and a `config.json`.

torch reads the pickle, restricted to weights, and onto its meta device, so that it allocates nothing and only tells
where each tensor's bytes lie; they are read from there. This is the one source that imports torch.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qformat import strict_json
from qformat.artifact.limits import MAX_NAME_NBYTES
from qformat.artifact.manifest import JsonObject
from qformat.artifact.tensor_spec import ELEMENT_NBYTES
from qformat.converters.sources.checkpoint_folder import CheckpointFolder
from qformat.converters.sources.source import PackedWeight, SourceTensor
from qformat.converters.sources.torch_zip import TorchZip
from qformat.errors import Reason, SourceError
from qformat.names import SINGLE_TORCH_NAME, TORCH_INDEX_NAME

if TYPE_CHECKING:
    import torch


_MAX_PICKLE_NBYTES = 64 * 2**20
_MAX_DIMENSIONS = 8
_BYTE_ORDER = "/byteorder"
_PICKLE_ERRORS = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError,
    AssertionError, OverflowError, UnicodeDecodeError,
)  # fmt: skip
"""What torch raises for a pickle that is not its own."""

_UNSUPPORTED_GLOBAL = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor's elements lie: `start`, the byte of the first in the file, and its strides in elements.

    member: the byte at which the zip member of its storage begins.
    """

    member: int
    start: int
    strides: tuple[int, ...]
    is_contiguous: bool


class TorchBin:
    """A local checkpoint in PyTorch's zip files. Opening reads their pickles and no weight."""

    kind = "torch_bin"
    packed: Mapping[str, PackedWeight] = {}

    def __init__(self, folder: Path) -> None:
        self._folder = CheckpointFolder(folder)
        self.location = folder
        self.state_when_opened = self._folder.state_when_opened
        self._mapped: dict[str, mmap.mmap] = {}
        self._zips: dict[str, TorchZip] = {}
        self._stored: dict[str, _Stored] = {}
        try:
            self.config = self._folder.read_config()
            self.tensors: Mapping[str, SourceTensor] = self._open_shards()
            self.side_files: Mapping[str, int] = self._folder.list_side_files()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the shards."""
        self._mapped.clear()
        self._folder.close()

    def describe(self) -> JsonObject:
        """Return kind and the shards' names and sizes."""
        files: JsonObject = {name: {"nbytes": opened.nbytes} for name, opened in sorted(self._zips.items())}
        return {"kind": self.kind, "files": files}

    def fingerprint(self) -> str:
        """Return the SHA-256 of config, tensors with their places, and side files."""
        digest = hashlib.sha256(f"{self.kind} {strict_json.dumps(self.config)}".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"\n{name} {tensor.file} {tensor.dtype} {tensor.shape} {self._stored[name]}".encode())
        for name in self.side_files:
            digest.update(f"\n{name} ".encode() + hashlib.sha256(self.read_side_file(name)).digest())
        return digest.hexdigest()

    def state(self) -> JsonObject:
        """Return inode, size and times of each file that was opened; null for one that is gone."""
        return self._folder.state()

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `offset` on. The storage's CRC-32 is checked first, once."""
        stored = self._stored[tensor.name]
        self._zips[tensor.file].check(stored.member)
        if stored.is_contiguous:
            self._folder.read_into(tensor.file, stored.start + offset, out)
        else:
            out[:] = self._gathered(tensor, stored, offset, len(out)).data

    def read_side_file(self, name: str) -> bytes:
        """Return the bytes of a file to carry over."""
        return self._folder.read_side_file(name)

    def _gathered(self, tensor: SourceTensor, stored: _Stored, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return bytes of a tensor that is a view of its storage, such as a transpose, in row-major order."""
        item_nbytes = ELEMENT_NBYTES[tensor.dtype]
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, stored.strides, strict=True)) + 1
        elements = np.frombuffer(self._mapped[tensor.file], f"<u{item_nbytes}", reach, stored.start)
        strides = tuple(stride * item_nbytes for stride in stored.strides)
        view = np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)
        row_nbytes = tensor.nbytes // tensor.shape[0]
        first, last = offset // row_nbytes, -(-(offset + nbytes) // row_nbytes)
        rows = np.ascontiguousarray(view[first:last]).reshape(-1).view(np.uint8)
        skipped = offset - first * row_nbytes
        return rows[skipped : skipped + nbytes]

    def _open_shards(self) -> dict[str, SourceTensor]:
        weight_map = self._folder.read_weight_map(TORCH_INDEX_NAME)
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_TORCH_NAME]
        tensors: dict[str, SourceTensor] = {}
        for shard in names:
            found = self._open_shard(shard)
            for name in found:
                if name in tensors:
                    raise SourceError(
                        Reason.DUPLICATE_TENSOR, self.location / shard, f"is in {tensors[name].file}, too", tensor=name
                    )
            tensors |= found
        if weight_map is not None:
            owner = {name: tensor.file for name, tensor in tensors.items()}
            self._folder.check_weight_map(TORCH_INDEX_NAME, weight_map, owner)
        return {name: tensor for name, tensor in tensors.items() if not self._is_tied_output(name, tensors)}

    def _open_shard(self, shard: str) -> dict[str, SourceTensor]:
        path = self.location / shard
        descriptor = self._folder.open(shard)
        opened = self._zips[shard] = TorchZip(descriptor, path)
        opened.read_member("/data.pkl", max_nbytes=_MAX_PICKLE_NBYTES)  # its checksum, before torch sees it
        if opened.has_member(_BYTE_ORDER) and opened.read_member(_BYTE_ORDER, max_nbytes=16) != b"little":
            raise SourceError(Reason.UNSUPPORTED_SOURCE, path, "was written on a big-endian machine")
        found: dict[str, SourceTensor] = {}
        for name, empty in _load(descriptor, path).items():
            stored, found[name] = _place(opened, path, name, empty)
            self._stored[name] = stored
            if not stored.is_contiguous and shard not in self._mapped:
                self._mapped[shard] = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        return found

    def _is_tied_output(self, name: str, tensors: Mapping[str, SourceTensor]) -> bool:
        """Whether this is the output head of a model that says it is tied, and the very storage of another tensor.

        Pickles hold both names, safetensors files the embedding only, and readers tie the two.
        """
        if name != "lm_head.weight" or self.config.get("tie_word_embeddings") is not True:
            return False
        same = [other for other, stored in self._stored.items() if stored == self._stored[name] and other != name]
        return any(
            tensors[other].file == tensors[name].file and tensors[other].shape == tensors[name].shape for other in same
        )


def _load(descriptor: int, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle, without their data. Raises SourceError, naming what a foreign pickle asks for."""
    import torch

    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)  # the descriptor's duplicate shares its position
            loaded = torch.load(file, map_location="meta", weights_only=True)
    except _PICKLE_ERRORS as error:
        asked = _UNSUPPORTED_GLOBAL.search(str(error))
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE,
            path,
            f"its pickle asks for {asked[1]}, no part of weights" if asked else f"torch refuses it: {first_line}",
            next_step="Only a file of plain tensors is read: save the model again with save_pretrained",
        ) from None
    if not isinstance(loaded, dict) or not loaded:
        raise SourceError(Reason.HEADER_SYNTAX, path, f"holds a {type(loaded).__name__}, expected a dict of tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            what = (
                f"{name[:80]!r} is a {type(value).__name__}" if isinstance(name, str) else f"{str(name)[:80]} is a name"
            )
            raise SourceError(Reason.HEADER_SYNTAX, path, f"{what}, expected a dict of tensors")
    return loaded


def _place(opened: TorchZip, path: Path, name: str, empty: torch.Tensor) -> tuple[_Stored, SourceTensor]:
    """Return where a tensor's elements lie, on checked numbers."""
    import torch

    dtypes = {
        torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
        torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
    if not name or len(name.encode("utf-8", "replace")) > MAX_NAME_NBYTES or not name.isprintable():
        raise SourceError(Reason.HEADER_LIMIT, path, f"{name[:80]!r} is no name of a tensor")
    if empty.layout is not torch.strided or empty.is_quantized or empty.dtype not in dtypes:
        what = f"{empty.dtype}, {empty.layout}".replace("torch.", "")
        raise SourceError(Reason.UNSUPPORTED_DTYPE, path, f"{what} tensors cannot be converted", tensor=name)
    dtype, shape, strides = dtypes[empty.dtype], tuple(map(int, empty.shape)), tuple(map(int, empty.stride()))
    if len(shape) > _MAX_DIMENSIONS:
        raise SourceError(Reason.HEADER_LIMIT, path, f"has {len(shape)} dimensions", tensor=name)
    storage = empty.untyped_storage()
    member, storage_nbytes = storage._checkpoint_offset, int(storage.nbytes())
    tensor = SourceTensor(name, dtype, shape, path.name)
    if member is None:
        raise SourceError(
            Reason.HEADER_OFFSETS, path, "torch does not say where its data lie in the file", tensor=name,
            next_step="Update torch, or save the model again with save_pretrained",
        )  # fmt: skip
    if tensor.nbytes:
        opened.refuse_wrong_place(member, storage_nbytes, name)
    first = int(empty.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((first, *strides)) < 0 or (tensor.nbytes and (first + reach + 1) * ELEMENT_NBYTES[dtype] > storage_nbytes):
        raise SourceError(Reason.HEADER_OFFSETS, path, "reaches beyond its storage", tensor=name)
    start = member + first * ELEMENT_NBYTES[dtype]
    stored = _Stored(member, start, strides, bool(empty.is_contiguous()))
    return stored, tensor
