"""The PyTorch source: `config.json` and `pytorch_model.bin`, or shards and their index.

torch loads each pickle with weights_only and onto its meta device, so that it allocates nothing and only tells where
each tensor's bytes are; they are then read from the file. This is the only source that imports torch.
"""

from __future__ import annotations

import mmap
import os
import pickle
import re
import struct
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
from qformat.converters.sources.file_source import FileSource
from qformat.converters.sources.source import SourceTensor
from qformat.converters.sources.torch_zip import TorchZip
from qformat.errors import Reason, SourceError, first_line
from qformat.names import SINGLE_TORCH_NAME, TORCH_INDEX_NAME

if TYPE_CHECKING:
    import torch


_MAX_PICKLE_NBYTES = 64 * 2**20
_MAX_DIMENSIONS = 8
_BYTE_ORDER = "/byteorder"
_PICKLE_ERRORS = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError,
    AssertionError, OverflowError, UnicodeDecodeError, struct.error,
)  # fmt: skip
"""Exceptions that torch raises for a pickle that it did not write."""

_UNSUPPORTED_GLOBAL = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Location of a tensor's elements.

    Attributes:
        member: Offset in bytes of the zip member that holds its storage.
        start: Offset in bytes of its first element in the file.
        strides: Strides in elements.
        is_contiguous: Whether the elements are in row-major order without gaps.
    """

    member: int
    start: int
    strides: tuple[int, ...]
    is_contiguous: bool


class TorchBin(FileSource[CheckpointFolder]):
    """A local checkpoint in PyTorch's zip files. Opening reads their pickles but no weights."""

    kind = "torch_bin"

    def __init__(self, folder: Path, *, index_wins: bool = False) -> None:
        super().__init__(CheckpointFolder(folder, index_wins=index_wins))
        self._mapped: dict[str, mmap.mmap] = {}
        self._zips: dict[str, TorchZip] = {}
        self._stored: dict[str, _Stored] = {}
        try:
            self.config = self._files.read_config()
            self.tensors: Mapping[str, SourceTensor] = self._open_shards()
            self.side_files: Mapping[str, int] = self._files.list_side_files()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the shards."""
        self._mapped.clear()
        super().close()

    def describe(self) -> JsonObject:
        """Return the kind and the shards' names and sizes, as the manifest records them."""
        files: JsonObject = {name: {"nbytes": opened.nbytes} for name, opened in sorted(self._zips.items())}
        return {"kind": self.kind, "files": files, **self._how_read()}

    def fingerprint(self) -> str:
        """Return the SHA-256 of config, tensors with their locations, and side files."""
        lines = [f"{self.kind} {strict_json.dumps(self.config, python_numbers=True)}"]
        for name, tensor in sorted(self.tensors.items()):
            lines.append(f"{name} {tensor.file} {tensor.dtype} {tensor.shape} {self._stored[name]}")
        return self._digest(lines, self.side_files)

    def read_into(self, tensor: SourceTensor, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of a tensor. The CRC-32 of its storage is checked once, before the first read.

        Args:
            tensor: The tensor to read.
            offset: Offset of the first byte in the tensor.
            out: Buffer to fill.
        """
        stored = self._stored[tensor.name]
        self._zips[tensor.file].check(stored.member)
        if stored.is_contiguous:
            self._files.read_into(tensor.file, stored.start + offset, out)
        else:
            out[:] = self._gathered(tensor, stored, offset, len(out)).data

    def _weight_files(self) -> list[str]:
        return [*self._zips, TORCH_INDEX_NAME]

    def _gathered(self, tensor: SourceTensor, stored: _Stored, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return bytes in row-major order of a tensor that is a view of its storage, such as a transpose."""
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
        weight_map = self._files.read_weight_map(TORCH_INDEX_NAME)
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_TORCH_NAME]
        shards = {shard: self._open_shard(shard) for shard in names}
        counted = self._files.names_by_shard(shards, TORCH_INDEX_NAME, weight_map)
        self._stored = {name: shards[shard][name][0] for shard in counted for name in counted[shard]}
        tensors = {name: shards[shard][name][1] for shard in counted for name in counted[shard]}
        return {name: tensor for name, tensor in tensors.items() if not self._is_tied_output(name, tensors)}

    def _open_shard(self, shard: str) -> dict[str, tuple[_Stored, SourceTensor]]:
        path = self.location / shard
        descriptor = self._files.open(shard)
        opened = self._zips[shard] = TorchZip(descriptor, path)
        opened.read_member("/data.pkl", max_nbytes=_MAX_PICKLE_NBYTES)  # checks its CRC-32 before torch reads it
        if opened.has_member(_BYTE_ORDER) and opened.read_member(_BYTE_ORDER, max_nbytes=16) != b"little":
            raise SourceError(Reason.UNSUPPORTED_SOURCE, path, "was written on a big-endian machine")
        found: dict[str, tuple[_Stored, SourceTensor]] = {}
        for name, empty in _load(descriptor, path).items():
            stored, _ = found[name] = _place(opened, path, name, empty)
            if not stored.is_contiguous and shard not in self._mapped:
                self._mapped[shard] = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        return found

    def _is_tied_output(self, name: str, tensors: Mapping[str, SourceTensor]) -> bool:
        """Return whether this is the output head of a model with tied embeddings and shares another tensor's storage.

        Pickles contain both names; safetensors files contain only the embedding, and readers tie the two.
        """
        if name != "lm_head.weight" or self.config.get("tie_word_embeddings") is not True:
            return False
        same = [other for other, stored in self._stored.items() if stored == self._stored[name] and other != name]
        return any(
            tensors[other].file == tensors[name].file and tensors[other].shape == tensors[name].shape for other in same
        )


def _load(descriptor: int, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle without their data. A pickle with other objects raises SourceError."""
    import torch

    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)  # the duplicated descriptor shares its position
            loaded = torch.load(file, map_location="meta", weights_only=True)
    except _PICKLE_ERRORS as error:
        asked = _UNSUPPORTED_GLOBAL.search(str(error))
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE,
            path,
            f"its pickle needs {asked[1]}, which is not part of weights"
            if asked
            else f"torch rejects it: {first_line(error)}",
            next_step="Save the model again with save_pretrained: only files with plain tensors can be read",
        ) from None
    if not isinstance(loaded, dict) or not loaded:
        raise SourceError(Reason.HEADER_SYNTAX, path, f"contains a {type(loaded).__name__}, expected a dict of tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            what = (
                f"{name[:80]!r} is a {type(value).__name__}"
                if isinstance(name, str)
                else f"the key {str(name)[:80]} is not a string"
            )
            raise SourceError(Reason.HEADER_SYNTAX, path, f"{what}, expected a dict of tensors")
    return loaded


def _place(opened: TorchZip, path: Path, name: str, empty: torch.Tensor) -> tuple[_Stored, SourceTensor]:
    """Return where a tensor's elements are in the file, after checking all numbers."""
    import torch

    dtypes = {
        torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
        torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
    if not name or len(name.encode("utf-8", "replace")) > MAX_NAME_NBYTES or not name.isprintable():
        raise SourceError(Reason.HEADER_LIMIT, path, f"{name[:80]!r} is not a valid tensor name")
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
            Reason.HEADER_OFFSETS, path, "torch does not report where its data is in the file", tensor=name,
            next_step="Update torch, or save the model again with save_pretrained",
        )  # fmt: skip
    opened.refuse_wrong_place(member, storage_nbytes, name)
    first = int(empty.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((first, *strides)) < 0 or (tensor.nbytes and (first + reach + 1) * ELEMENT_NBYTES[dtype] > storage_nbytes):
        raise SourceError(Reason.HEADER_OFFSETS, path, "extends beyond its storage", tensor=name)
    start = member + first * ELEMENT_NBYTES[dtype]
    stored = _Stored(member, start, strides, bool(empty.is_contiguous()))
    return stored, tensor
