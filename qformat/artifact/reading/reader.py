"""Open artifacts: read-only tensors, mapped on first use after all structural checks (spec sections 2, 3 and 7)."""

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
from qformat.artifact.reading.listed_files import size_error
from qformat.artifact.reading.structure import ShardLayout, Structure, check_structure
from qformat.artifact.reading.watch import MappedFileWatch
from qformat.artifact.sources.source_files import open_shard
from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.quant_state import QuantState
from qformat.errors import ArtifactError, UsageError

_NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip

_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
"""Bits of the exponent by dtype. All of them are set in NaN and Inf only."""

_CHECKED_ELEMENTS = 2**20

_PRIVATE = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
"""Flags of a private mapping. No swap is reserved for it, so that a file larger than the memory can be mapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor(PackedArrays):
    """Packed weight of an artifact. Every array is a read-only view of the mapped file.

    Attributes:
        name: Name of the weight.
    """

    name: str

    def decode(self, float_format: FloatFormat | None = None, out: Raw | None = None) -> Raw:
        """Return the decoded weight in its shape, as raw elements.

        Args:
            float_format: Float format of the result, by default that of the source tensor. Elements in bfloat16 and
                float16 are returned as their bits in uint16, elements in float32 as float32.
            out: Array for the elements [n]. Allocated if omitted.

        Raises:
            UsageError: `out` has the wrong size or dtype.
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
    """Kept tensor of an artifact.

    Attributes:
        name: Name of the tensor.
        dtype: Dtype in the header of the shard.
        data: Read-only view of the mapped file, in the shape of the tensor. BF16 and F8 elements are unsigned bits.
    """

    name: str
    dtype: str
    data: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.data.shape

    def decode(self) -> NDArray[Any]:
        """Return the values as float32 for BF16, F16 and F32, and the data itself for every other dtype."""
        if self.dtype not in FloatFormat.__members__:
            return self.data
        float_format = FloatFormat(self.dtype)
        return widen(self.data.view(float_format.raw_dtype), float_format)


class MappedShards:
    """Shards of a directory, each mapped on first use. `watch` detects later changes to the files."""

    def __init__(self, layout: ShardLayout) -> None:
        self.path = layout.path
        self.layout = layout
        self.watch = MappedFileWatch()
        self._maps: dict[str, mmap.mmap] = {}

    def close(self) -> None:
        """Release the mapped files."""
        self._maps.clear()

    def quant_state(self, name: str) -> QuantState:
        """Return the quant_state of a packed tensor.

        Raises:
            KeyError: No packed tensor has this name.
        """
        return self.layout.states[name]

    def mapped(self, shard: str) -> mmap.mmap:
        """Return the mapping of an entire shard. It is private: data written to it does not reach the file."""
        if shard not in self._maps:
            expected = self.layout.shard_nbytes[shard]
            with open_shard(self.layout, shard, error=ArtifactError) as descriptor:
                status = os.fstat(descriptor)
                if status.st_size != expected:
                    raise size_error(self.path / shard, status.st_size, expected)
                self._maps[shard] = mmap.mmap(
                    descriptor, expected, flags=_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
                self.watch.add(self.path / shard, self._maps[shard], status)
        return self._maps[shard]

    def view(self, name: str) -> NDArray[Any]:
        """Return a component as a read-only view of its mapped file. BF16 and F8 elements are unsigned bits."""
        located = self.layout.located[name]
        entry = located.entry
        data = np.frombuffer(self.mapped(located.shard), np.uint8, entry.nbytes, entry.start)
        data.flags.writeable = False
        return data.view(_NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def first_non_finite(self) -> tuple[str, str] | None:
        """Return the shard and the name of the first tensor that contains NaN or Inf, None if all are finite."""
        for name, located in self.layout.located.items():
            exponent = _EXPONENTS.get(located.entry.dtype)
            if exponent is None:
                continue
            bits = self.view(name).reshape(-1)
            bits = bits.view(f"<u{bits.itemsize}")
            parts = (bits[start : start + _CHECKED_ELEMENTS] for start in range(0, bits.size, _CHECKED_ELEMENTS))
            if any(((part & exponent) == exponent).any() for part in parts):
                return located.shard, name
        return None


class Artifact(MappedShards, Mapping[str, PackedTensor | KeptTensor]):
    """Open artifact: a mapping from tensor names to tensors. Close it, or use it as a context manager.

    Views stay valid after `close`. The files must not be changed or truncated while a view exists, because a mapping
    cannot protect against that.
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
    """Open an artifact after checking its structure and the digests of its small files and headers.

    Only small files, headers and small components are read, no weights.

    Raises:
        ArtifactError: The artifact is damaged or not supported.
    """
    return Artifact(check_structure(Path(path)))
