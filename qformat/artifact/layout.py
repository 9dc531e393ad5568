"""Placement of tensors in shards, computed from their names and sizes alone (spec section 3.3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qformat.artifact import header
from qformat.artifact.tensor_spec import TensorSpec

LARGEST_ALIGNMENT = 4096
"""Largest alignment of a component in bytes: one page."""

MAX_TENSORS_PER_SHARD = 40_000
"""Largest number of tensors per shard. It keeps a header far below its limit even with long names."""

_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """Tensor with its place in a shard.

    Attributes:
        tensor: Name, dtype and shape.
        start: Offset of the first byte of its data in the file.
    """

    tensor: TensorSpec
    start: int

    @property
    def stop(self) -> int:
        """Offset after the last byte of its data in the file."""
        return self.start + self.tensor.nbytes


@dataclass(frozen=True, slots=True)
class Shard:
    """Plan of one shard.

    Attributes:
        name: Name of the file.
        header: Bytes before the data: length field, JSON text and padding.
        tensors: Tensors in the order of their data.
    """

    name: str
    header: bytes
    tensors: tuple[PlacedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.tensors[-1].stop


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts `layers.2` before `layers.10`."""
    parts = _DIGITS.split(name)
    return tuple((1, int(part), part) if _DIGITS.fullmatch(part) else (0, 0, part) for part in parts)


def alignment(nbytes: int) -> int:
    """Return the alignment of a component: the largest power of two that divides its size, at most one page.

    Args:
        nbytes: Size of the component in bytes. An empty component has the largest alignment.
    """
    return min(nbytes & -nbytes, LARGEST_ALIGNMENT) if nbytes else LARGEST_ALIGNMENT


def place(groups: Sequence[Sequence[TensorSpec]], *, max_shard_nbytes: int) -> tuple[Shard, ...]:
    """Place groups of tensors in shards, in the given order.

    Inside a shard, tensors are sorted by descending alignment. Each tensor is then aligned, and no gaps remain.

    Args:
        groups: Tensors that must be in the same shard, such as the components of one weight.
        max_shard_nbytes: Size in bytes at which a shard is full. A larger group gets its own shard.
    """
    bins: list[list[TensorSpec]] = []
    room = 0
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if not bins or nbytes > room or len(bins[-1]) + len(group) > MAX_TENSORS_PER_SHARD:
            bins.append([])
            room = max_shard_nbytes
        bins[-1].extend(group)
        room -= nbytes
    return tuple(
        _shard(f"model-{number:05d}-of-{len(bins):05d}.safetensors", tensors)
        for number, tensors in enumerate(bins, start=1)
    )


def _shard(name: str, tensors: list[TensorSpec]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: -alignment(tensor.nbytes))
    header_bytes = header.build(ordered)
    placed = []
    position = len(header_bytes)
    for tensor in ordered:
        placed.append(PlacedTensor(tensor, position))
        position += tensor.nbytes
    return Shard(name, header_bytes, tuple(placed))
