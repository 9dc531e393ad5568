"""The components of an artifact as torch tensors: views of its mapped files, or of their copies on a device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qformat.artifact.components import Component
from qformat.artifact.header import TensorEntry
from qformat.artifact.reader import MappedShards
from qformat.codec.nf4 import packed_nbytes
from qformat.codec.quant_state import QuantState

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""By safetensors' names."""


@dataclass(frozen=True, slots=True)
class ShardData:
    """The bytes of a shard, uint8, from byte `start` of the file on."""

    data: Tensor
    start: int

    def view(self, entry: TensorEntry) -> Tensor:
        """Return a component in its dtype and shape: a view, where it lies aligned."""
        data = self.data[entry.start - self.start : entry.stop - self.start]
        if data.data_ptr() % (TORCH_DTYPES[entry.dtype].itemsize):
            data = data.clone()  # Our own files are aligned; others' need not be.
        return data.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


@dataclass(frozen=True, slots=True)
class PackedComponents:
    """The components of one packed weight, by part, and what its codes mean."""

    components: Mapping[Component, Tensor]
    state: QuantState


def map_shards(shards: MappedShards) -> dict[str, ShardData]:
    """Return every shard as a view of the mapped file. A tensor keeps its mapping alive, `shards` may be closed."""
    names = {located.shard for located in shards.layout.located.values()}
    return {name: ShardData(torch.frombuffer(shards.mapped(name), dtype=torch.uint8), 0) for name in names}


def packed_names(names: Iterable[str]) -> set[str]:
    """Return the packed weights, by the names of all components."""
    return {name.removesuffix(Component.QUANT_STATE) for name in names if name.endswith(Component.QUANT_STATE)}


def tensor_names(names: Iterable[str]) -> list[str]:
    """Return the names of all tensors, packed ones once, by the names of all components."""
    names = list(names)
    parts = {name + part.value for name in packed_names(names) for part in Component if part.value}
    return [name for name in names if name not in parts]


def tensors_of(shards: MappedShards, data: Mapping[str, ShardData]) -> dict[str, PackedComponents | Tensor]:
    """Return all tensors by name, as views of the shards' bytes."""
    located = shards.layout.located

    def view(name: str) -> Tensor:
        return data[located[name].shard].view(located[name].entry)

    found: dict[str, PackedComponents | Tensor] = {}
    of_packed: set[str] = set()
    for name in sorted(packed_names(located)):
        parts = {part: view(name + part.value) for part in Component if name + part.value in located}
        of_packed |= {name + part.value for part in parts}
        state = shards.quant_state(name)
        # bitsandbytes may store the codes under another dtype, as a vector, and filled up to a whole element.
        codes = parts[Component.PACKED].view(torch.uint8).view(-1, 1)
        parts[Component.PACKED] = codes[: packed_nbytes(math.prod(state.shape))]
        found[name] = PackedComponents(parts, state)
    found.update((name, view(name)) for name in located if name not in of_packed)
    return found
