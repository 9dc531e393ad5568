"""An open artifact: mapped, lazy, read-only tensors, behind every structural check (spec sections 2, 3 and 7)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.components import Component
from qformat.artifact.manifest import KeptRecord
from qformat.artifact.packed_arrays import PackedArrays
from qformat.artifact.reading.regular_files import open_regular
from qformat.artifact.reading.structure import ShardLayout, Structure, check_structure, size_error
from qformat.artifact.reading.watch import MappedFileWatch
from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.quant_state import QuantState
from qformat.errors import ArtifactError, UsageError

_NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip

_PRIVATE = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
"""No swap is set aside for pages that hardly anybody writes to: a file larger than the memory can be mapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor(PackedArrays):
    """A 4-bit weight of an artifact; every array is a read-only view of the mapped file."""

    name: str

    def decode(self, float_format: FloatFormat | None = None, out: Raw | None = None) -> Raw:
        """Return the weight in its shape: raw elements of `float_format` (default: what the source was).

        bf16 comes as its bits in uint16, fp16 as its bits in uint16, fp32 as float32. `out`: a flat buffer to reuse.
        Raises UsageError for a buffer that does not fit.
        """
        raw_dtype = (float_format or self.state.float_format).raw_dtype
        if out is not None and (out.size != self.layout.n_elements or out.dtype != raw_dtype):
            raise UsageError(
                f"{self.name}: out has {out.size} elements of {out.dtype}, expected {self.layout.n_elements} of "
                f"{raw_dtype}"
            )
        return PackedArrays.decode(self, float_format, out)


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A tensor kept bit for bit: a read-only view of the mapped file in its shape; BF16 and F8 as unsigned bits."""

    name: str
    dtype: str
    data: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.data.shape

    def decode(self) -> NDArray[Any]:
        """Return the values: float32 for BF16, F16 and F32, the data itself for every other dtype."""
        if self.dtype not in FloatFormat.__members__:
            return self.data
        float_format = FloatFormat(self.dtype)
        return widen(self.data.view(float_format.raw_dtype), float_format)


class MappedShards:
    """The shards of a folder, mapped when they are first looked at. `watch` tells whether the files changed since."""

    def __init__(self, layout: ShardLayout) -> None:
        self.path = layout.path
        self.layout = layout
        self.watch = MappedFileWatch()
        self._maps: dict[str, mmap.mmap] = {}

    def close(self) -> None:
        """Let go of the mapped files."""
        self._maps.clear()

    def quant_state(self, name: str) -> QuantState:
        """Return what the codes of a packed tensor mean. Raises KeyError for a name that is no packed tensor."""
        return self.layout.states[name]

    def mapped(self, shard: str) -> mmap.mmap:
        """Return the mapping of a whole shard file. It is private: what is written to it never reaches the file."""
        if shard not in self._maps:
            expected = self.layout.shard_nbytes[shard]
            with open_regular(self.path, shard, error=ArtifactError) as descriptor:
                status = os.fstat(descriptor)
                if status.st_size != expected:
                    raise size_error(self.path / shard, status.st_size, expected)
                self._maps[shard] = mmap.mmap(
                    descriptor, expected, flags=_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
                self.watch.add(self.path / shard, self._maps[shard], status)
        return self._maps[shard]

    def view(self, name: str) -> NDArray[Any]:
        """Return a component as a read-only view of its mapped file; BF16 and F8 as unsigned bits."""
        located = self.layout.located[name]
        entry = located.entry
        data = np.frombuffer(self.mapped(located.shard), np.uint8, entry.nbytes, entry.start)
        data.flags.writeable = False
        return data.view(_NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)


class Artifact(MappedShards, Mapping[str, PackedTensor | KeptTensor]):
    """An open artifact: a mapping from tensor names to tensors. Close it, or use it as a context manager.

    Views stay valid after `close` for as long as somebody holds them. The files must not be changed or cut while
    they are mapped: that is the one thing a mapping cannot survive.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.structure = structure
        self.manifest = structure.manifest
        self.located = structure.located

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.tensors)

    def __len__(self) -> int:
        return len(self.manifest.tensors)

    def __getitem__(self, name: str) -> PackedTensor | KeptTensor:
        record = self.manifest.tensors[name]
        if isinstance(record, KeptRecord):
            return KeptTensor(name, record.dtype, self.view(name))
        parts = {part: self.view(name + part.value) for part in record.components}
        return PackedTensor(
            name=name,
            state=self.quant_state(name),
            packed=parts[Component.PACKED].reshape(-1),
            absmax=parts[Component.ABSMAX],
            nested_absmax=parts.get(Component.NESTED_ABSMAX),
            nested_quant_map=parts.get(Component.NESTED_QUANT_MAP),
        )


def open_artifact(path: Path | str) -> Artifact:
    """Open an artifact after checking its whole structure. Reads headers and small maps, no weights.

    Raises: ArtifactError with the reason, the file, the tensor and the field.
    """
    return Artifact(check_structure(Path(path)))
