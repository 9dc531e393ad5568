"""Components of an artifact as torch tensors over its mapped files, or over their copies on a device.

Nothing is copied, and yet every tensor has a storage of its own, which covers exactly its bytes. torch, safetensors and
accelerate save, copy and compare storages as a whole. If the tensors of a shard shared one storage, a saved norm would
be as large as the shard, and accelerate would save one tensor of the shard and drop the others as duplicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Protocol

import torch
from torch import Tensor

from qformat.artifact.components import Component
from qformat.artifact.header import TensorEntry
from qformat.artifact.reading.reader import MappedShards
from qformat.artifact.reading.structure import ShardLayout
from qformat.codec.nf4 import packed_nbytes
from qformat.codec.quant_state import QuantState

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""torch dtype by its name in safetensors."""

_PARTS = tuple(Component)
_BESIDE_PACKED = tuple(part for part in Component if part is not Component.PACKED)


class ShardBytes(Protocol):
    """Bytes of a shard."""

    def tensor(self, entry: TensorEntry) -> Tensor:
        """Return a component in its dtype and shape: over the shard's bytes if it is aligned, else a copy."""


@dataclass(frozen=True, slots=True)
class MappedShard:
    """A shard as a mapped file.

    Attributes:
        mapping: Mapping of the entire file. Each tensor keeps it alive.
    """

    mapping: mmap

    def tensor(self, entry: TensorEntry) -> Tensor:
        """Return a component in its dtype and shape: over the mapping if it is aligned, else a copy."""
        dtype = TORCH_DTYPES[entry.dtype]
        nbytes = entry.stop - entry.start
        if nbytes == 0:  # torch.frombuffer rejects it
            return torch.empty(entry.shape, dtype=dtype, device="cpu")
        if entry.start % dtype.itemsize:  # Files of other writers need not be aligned.
            data = (
                torch.frombuffer(self.mapping, dtype=torch.uint8, count=nbytes, offset=entry.start).clone().view(dtype)
            )
        else:
            data = torch.frombuffer(self.mapping, dtype=dtype, count=nbytes // dtype.itemsize, offset=entry.start)
        return data if len(entry.shape) == 1 else data.view(entry.shape)


@dataclass(frozen=True, slots=True)
class CopiedShard:
    """A shard as a copy of its data on a device.

    Attributes:
        data: uint8 [number of bytes].
        start: Offset of the first byte in the file.
    """

    data: Tensor
    start: int

    def tensor(self, entry: TensorEntry) -> Tensor:
        """Return a component in its dtype and shape: over the copy if it is aligned, else a copy of its own."""
        return tensor_over(self.data, entry.start - self.start, TORCH_DTYPES[entry.dtype], entry.shape)


@dataclass(frozen=True, slots=True)
class PackedComponents:
    """Components of one packed weight.

    Attributes:
        components: Tensor of each component.
        state: Shape, block size, codebook and offset.
    """

    components: Mapping[Component, Tensor]
    state: QuantState


def tensor_over(memory: Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return a tensor over a part of an allocation, with a storage of its own that keeps the allocation alive.

    Args:
        memory: uint8 [number of bytes], on any device, pinned or not.
        start: Offset of the tensor's first byte.
        dtype: Dtype of the tensor.
        shape: Shape of the tensor, stored in row-major order.

    Returns:
        The tensor. It is a copy if it is not aligned to the dtype.
    """
    whole = memory.untyped_storage()
    first = memory.storage_offset() + start
    nbytes = math.prod(shape) * dtype.itemsize
    if (whole.data_ptr() + first) % dtype.itemsize:
        return memory[start : start + nbytes].clone().view(dtype).view(shape)
    # A slice of a storage is a storage: the same memory, with its own beginning and size.
    part: torch.UntypedStorage = whole[first : first + nbytes]
    tensor: Tensor = torch.empty(0, dtype=dtype, device=memory.device).set_(part, 0, shape)  # type: ignore[call-overload]
    return tensor


def map_shards(shards: MappedShards) -> dict[str, MappedShard]:
    """Map every shard. A tensor keeps its mapping alive after `shards` is closed."""
    names = {located.shard for located in shards.layout.located.values()}
    return {name: MappedShard(shards.mapped(name)) for name in names}


def packed_names(names: Iterable[str]) -> set[str]:
    """Return the names of the packed weights among the names of all tensors in the files."""
    return {name.removesuffix(Component.QUANT_STATE) for name in names if name.endswith(Component.QUANT_STATE)}


def tensor_names(layout: ShardLayout) -> list[str]:
    """Return the names of all tensors in the shards; a packed weight counts as one tensor."""
    parts = {name + part for name in layout.states for part in _BESIDE_PACKED}
    return [name for name in layout.located if name not in parts]


def tensors_of(shards: MappedShards, data: Mapping[str, ShardBytes]) -> dict[str, PackedComponents | Tensor]:
    """Return all tensors over the shards' bytes, each with a storage of its own.

    Args:
        shards: Open shards.
        data: Bytes of each shard by the shard's name, on any device.

    Returns:
        Tensors by their names in the files; a packed weight is one entry.
    """
    located = shards.layout.located

    def tensor(name: str) -> Tensor:
        return data[located[name].shard].tensor(located[name].entry)

    found: dict[str, PackedComponents | Tensor] = {}
    of_packed: set[str] = set()
    for name in sorted(shards.layout.states):
        parts = {part: tensor(name + part) for part in _PARTS if name + part in located}
        of_packed.update(name + part for part in parts)
        state = shards.quant_state(name)
        # bitsandbytes may store the codes in another dtype, as a vector, padded to a whole element.
        n_codes = packed_nbytes(math.prod(state.shape))
        codes = parts[Component.PACKED]
        if codes.dtype is not torch.uint8 or codes.shape != (n_codes, 1):
            parts[Component.PACKED] = codes.view(torch.uint8).view(-1, 1)[:n_codes]
        found[name] = PackedComponents(parts, state)
    found.update((name, tensor(name)) for name in located if name not in of_packed)
    return found
