"""Components of an artifact as torch tensors: views of its mapped files, or of their copies on a device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class ShardData:
    """Bytes of a shard.

    Attributes:
        data: uint8 [number of bytes].
        start: Offset of the first byte in the file.
    """

    data: Tensor
    start: int

    def view(self, entry: TensorEntry) -> Tensor:
        """Return a component in its dtype and shape: a view if it is aligned, else a copy."""
        data = self.data[entry.start - self.start : entry.stop - self.start]
        dtype = TORCH_DTYPES[entry.dtype]
        if dtype.itemsize > 1 and data.data_ptr() % dtype.itemsize:
            data = data.clone()  # Files of other writers need not be aligned.
        if dtype is not torch.uint8:
            data = data.view(dtype)
        return data if len(entry.shape) == 1 else data.view(entry.shape)


@dataclass(frozen=True, slots=True)
class PackedComponents:
    """Components of one packed weight.

    Attributes:
        components: Tensor of each component.
        state: Shape, block size, codebook and offset.
    """

    components: Mapping[Component, Tensor]
    state: QuantState


def map_shards(shards: MappedShards) -> dict[str, ShardData]:
    """Return every shard as a view of the mapped file. A tensor keeps its mapping alive after `shards` is closed."""
    names = {located.shard for located in shards.layout.located.values()}
    return {name: ShardData(torch.frombuffer(shards.mapped(name), dtype=torch.uint8), 0) for name in names}


def packed_names(names: Iterable[str]) -> set[str]:
    """Return the names of the packed weights among the names of all tensors in the files."""
    return {name.removesuffix(Component.QUANT_STATE) for name in names if name.endswith(Component.QUANT_STATE)}


def tensor_names(layout: ShardLayout) -> list[str]:
    """Return the names of all tensors in the shards; a packed weight counts as one tensor."""
    parts = {name + part for name in layout.states for part in _BESIDE_PACKED}
    return [name for name in layout.located if name not in parts]


def tensors_of(shards: MappedShards, data: Mapping[str, ShardData]) -> dict[str, PackedComponents | Tensor]:
    """Return all tensors as views of the shards' bytes.

    Args:
        shards: Open shards.
        data: Bytes of each shard by the shard's name, on any device.

    Returns:
        Tensors by their names in the files; a packed weight is one entry.
    """
    located = shards.layout.located

    def view(name: str) -> Tensor:
        return data[located[name].shard].view(located[name].entry)

    found: dict[str, PackedComponents | Tensor] = {}
    of_packed: set[str] = set()
    for name in sorted(shards.layout.states):
        parts = {part: view(name + part) for part in _PARTS if name + part in located}
        of_packed.update(name + part for part in parts)
        state = shards.quant_state(name)
        # bitsandbytes may store the codes in another dtype, as a vector, padded to a whole element.
        n_codes = packed_nbytes(math.prod(state.shape))
        codes = parts[Component.PACKED]
        if codes.dtype is not torch.uint8 or codes.shape != (n_codes, 1):
            parts[Component.PACKED] = codes.view(torch.uint8).view(-1, 1)[:n_codes]
        found[name] = PackedComponents(parts, state)
    found.update((name, view(name)) for name in located if name not in of_packed)
    return found
