"""The components of an artifact as torch tensors: views of its mapped files, or of their copies on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qformat.artifact.components import Component
from qformat.artifact.header import TensorEntry
from qformat.artifact.manifest import KeptRecord
from qformat.artifact.reader import Artifact
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
        """Return a component in its dtype and shape, without a copy."""
        data = self.data[entry.start - self.start : entry.stop - self.start]
        return data.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


@dataclass(frozen=True, slots=True)
class PackedComponents:
    """The components of one packed weight, by part, and what its codes mean."""

    components: Mapping[Component, Tensor]
    state: QuantState


def map_shards(artifact: Artifact) -> dict[str, ShardData]:
    """Return every shard as a view of the mapped file. A tensor keeps its mapping alive, the artifact may be closed."""
    shards = {located.shard for located in artifact.located.values()}
    return {shard: ShardData(torch.frombuffer(artifact.mapped(shard), dtype=torch.uint8), 0) for shard in shards}


def tensors_of(artifact: Artifact, shards: Mapping[str, ShardData]) -> dict[str, PackedComponents | Tensor]:
    """Return all tensors of an artifact by name, as views of its shards' bytes."""

    def view(name: str) -> Tensor:
        located = artifact.located[name]
        return shards[located.shard].view(located.entry)

    found: dict[str, PackedComponents | Tensor] = {}
    for name, record in artifact.manifest.tensors.items():
        if isinstance(record, KeptRecord):
            found[name] = view(name)
        else:
            parts = {part: view(name + part.value) for part in record.components}
            found[name] = PackedComponents(parts, artifact.quant_state(name))
    return found
